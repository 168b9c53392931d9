"""A job under Keras in which one rank is slow on purpose, in compiled steps: see test_stragglers.py."""

import sys
import time

import keras
import numpy as np
import tensorflow as tf

import hvdlm

case, way = sys.argv[1:]
slow = hvdlm.rank() == 1
BATCH, STEPS = 16, 50


def nap(seconds):
    time.sleep(float(seconds))
    return np.float32(0)


class Slowly(keras.layers.Layer):
    def call(self, x):
        seconds = 0.015 if case == "compute" and slow else 0.005
        rows = tf.cast(tf.shape(x)[0], tf.float32)
        return x + tf.ensure_shape(tf.numpy_function(lambda n: nap(n * seconds), [rows], tf.float32), [])


def read(x, y):
    seconds = 0.01 if case == "data" and slow else 0.0
    return x + tf.ensure_shape(tf.numpy_function(lambda: nap(seconds), [], tf.float32), []), y


x, y = np.ones((BATCH * STEPS, 4), np.float32), np.zeros((BATCH * STEPS, 1), np.float32)
dataset = tf.data.Dataset.from_tensor_slices((x, y)).map(read).batch(BATCH)
model = keras.Sequential([keras.layers.Input((4,)), Slowly(), keras.layers.Dense(1)])
optimizer = keras.optimizers.SGD(1e-3)


@hvdlm.distribute(timings_every=10)
def train(model, optimizer, dataset):
    if way == "fit":
        model.compile(optimizer, "mse")
        model.fit(dataset, verbose=0)
        return

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for x, y in dataset:
        step(x, y)


train(model, optimizer, dataset)
