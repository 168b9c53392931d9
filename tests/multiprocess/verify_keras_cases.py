"""Small Keras scripts for ``hvdlm verify``: correct ones, and ones with one mistake each."""

from __future__ import annotations

__all__ = ["CORRECT", "MISTAKES"]

_BASE = """
import hvdlm, keras, numpy as np, tensorflow as tf
from keras import layers

{setup}
random = np.random.default_rng(1)
x, y = random.integers(50, size=(256, 6)), random.integers(5, size=256)
keras.utils.set_random_seed({seed})
model = keras.Sequential([
    keras.Input((6,)), layers.Embedding(50, 16), layers.Flatten(), layers.Dense(32){middle},
    layers.Activation("gelu"), layers.Dense(5),
])
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="{loss}")
optimizer = keras.optimizers.{optimizer}
"""
_FIT = (
    _BASE
    + """
model.compile(optimizer, loss_fn)
{wrap}
{after}
model.fit(x, y, batch_size=16, epochs=2, verbose=0{fit})
"""
)
_LOOP = (
    _BASE
    + """
data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
{wrap}
{after}

@tf.function
def train_step(inputs, targets):
    with tf.GradientTape() as tape:
        loss = loss_fn(targets, model(inputs, training=True))
    grads = tape.gradient(loss, model.trainable_variables)
    {grads}
    {step}
    return loss

for inputs, targets in data:
    train_step(inputs, targets)
    {after_step}
"""
)
_DEFAULTS = {
    "setup": "",
    "seed": "0",
    "middle": "",
    "loss": "sum_over_batch_size",
    "optimizer": "Adam(1e-3)",
    "after": "",
    "fit": "",
    "grads": "pass",
    "step": "optimizer.apply_gradients(zip(grads, model.trainable_variables))",
    "after_step": "pass",
}


def _fit(**parts: str) -> str:
    return _FIT.format(**({**_DEFAULTS, "wrap": "hvdlm.wrap(model)"} | parts))


def _loop(**parts: str) -> str:
    wrap = "model, optimizer, data = hvdlm.wrap(model, optimizer, data)"
    return _LOOP.format(**({**_DEFAULTS, "wrap": wrap} | parts))


_STATISTIC = """
class Mean(layers.Layer):
    def build(self, shape):
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)
    def call(self, x, training=False):
        if training:
            self.seen.assign_add(tf.reduce_mean(x))
        return x
"""

CORRECT = {
    "fit": _fit(),
    "fit_clipnorm": _fit(optimizer="SGD(0.1, momentum=0.9, global_clipnorm=0.05)"),
    "fit_batch_norm": _fit(middle=", layers.BatchNormalization()"),
    "fit_validation": _fit(fit=", validation_split=0.25, callbacks=[keras.callbacks.ModelCheckpoint('m.keras')]"),
    "loop": _loop(),
    "loop_save": _loop(
        optimizer="SGD(0.1)", after_step="hvdlm.save(model, 'm.keras'); model.save('x.keras') if hvdlm.is_main() else 0"
    ),
}

MISTAKES = {
    "fit_not_sharded": ("data", _fit(wrap="hvdlm.wrap(optimizer)")),
    "fit_same_batches": ("data", _fit(wrap="hvdlm.wrap(optimizer)", fit=", shuffle=False")),
    "loop_not_sharded": ("data", _loop(wrap="model, optimizer = hvdlm.wrap(model, optimizer)")),
    "rate_scaled_by_hand": ("learning rate", _fit(optimizer="Adam(1e-3 * hvdlm.size())", setup="hvdlm.init()")),
    "rate_set_by_callback": (
        "learning rate",
        _loop(
            wrap='model, optimizer, data = hvdlm.wrap(model, optimizer, data, batch="per_worker", lr_scale="linear")',
            after_step="optimizer.learning_rate = 5e-4",
        ),
    ),
    "clipped_before": ("clipping", _loop(grads="grads, _ = tf.clip_by_global_norm(grads, 0.01)")),
    "clamped_before": ("clipping", _loop(grads="grads = [tf.clip_by_value(g, -1e-4, 1e-4) for g in grads]")),
    "seed_by_rank": ("seed", _fit(seed="hvdlm.rank()", setup="hvdlm.init()")),
    "dropout": ("dropout", _fit(middle=", layers.Dropout(0.3)")),
    "local_norms": (
        "batch norm",
        _fit(middle=", layers.BatchNormalization()", wrap='hvdlm.wrap(model, batch_norm="local")'),
    ),
    "buffer": ("buffer", _loop(setup=_STATISTIC, middle=", Mean()")),
    "parameter": ("parameter", _loop(after_step="model.layers[-1].bias.assign_add(1e-3 * hvdlm.rank() * tf.ones(5))")),
    "sum_as_mean": ("loss", _loop(loss="sum")),
    "mean_as_sum": ("loss", _fit(wrap='hvdlm.wrap(model, reduction="sum")')),
    "step_on_main": (
        "optimizer step",
        _loop(step="optimizer.apply_gradients(zip(grads, model.trainable_variables)) if hvdlm.is_main() else None"),
    ),
    "save_everywhere": ("checkpoint", _loop(after_step="model.save('m.keras')")),
    "save_in_callback": (
        "checkpoint",
        _fit(
            after="class Keep(keras.callbacks.Callback):\n"
            "    def on_train_batch_end(self, batch, logs=None):\n"
            "        self.model.save_weights('m.weights.h5')",
            fit=", callbacks=[Keep()]",
        ),
    ),
    "fixed_divisor": (
        "loss",
        _loop(
            loss="sum",
            wrap="model, optimizer, data = hvdlm.wrap(model, optimizer, data)",
            setup="hvdlm.init()",
            grads="grads = [tf.convert_to_tensor(g) * hvdlm.size() / 16 for g in grads]",
        ),
    ),
}
"""name -> (cause that verify names, script)"""
