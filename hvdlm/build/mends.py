"""What Horovod 0.28.1 needs to build and work today: named changes to its source, as data.

A change of this table is a change of what gets built: raise :data:`LABEL` with it (a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Collection

from hvdlm.build.edits import Edit, Mend

__all__ = ["HOROVOD", "LABEL", "MENDS", "select_mends"]

HOROVOD = "0.28.1"
LABEL = "hvdlm4"
"""Local version label of a wheel built with this set of mends: ``0.28.1+hvdlm4``."""

MENDS = (
    Mend(
        "cxx17",
        "the headers of torch 2.1 and later are C++17 (horovod/horovod#3996)",
        (
            Edit("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
            Edit("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
        ),
    ),
    Mend(
        "no-xla",
        "TensorFlow's wheel lacks a header that the XLA operations include; they only serve compiled steps on GPUs",
        (
            Edit(
                "horovod/tensorflow/CMakeLists.txt",
                'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
                "",
            ),
        ),
    ),
    Mend(
        "no-cuda-probe",
        "a CPU build must not depend on whether nvcc is installed, nor on the CUDA support of torch",
        (
            Edit(
                "CMakeLists.txt",
                "include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)\n",
                'set(CMAKE_CUDA_COMPILER "")\nif(FALSE)\n',
            ),
            Edit("horovod/torch/CMakeLists.txt", "elseif (Pytorch_CUDA AND NOT HAVE_CUDA)", "elseif (FALSE)"),
        ),
        needs="cpu",
    ),
    Mend(
        "gloo-avx",
        "without USE_AVX Gloo sums half floats one by one, two to three times slower",
        (
            Edit(
                "CMakeLists.txt",
                "    add_subdirectory(third_party/gloo)\n",
                "    set(USE_AVX ON)\n    add_subdirectory(third_party/gloo)\n",
            ),
        ),
        needs="avx",
    ),
    Mend(
        "gloo-duplex",
        "Gloo announced what it sends before what it receives; the announcement then queued behind the data, and two "
        "workers that exchange large tensors sent one after the other instead of at once",
        (
            Edit(
                "third_party/gloo/gloo/alltoallv.cc",
                "    int sendRank = (myRank + i) % worldSize;\n"
                "    int recvRank = (myRank + worldSize - i) % worldSize;\n"
                "    in->send(\n"
                "        sendRank, slot, inOffsetPerRank[sendRank], inLengthPerRank[sendRank]);\n"
                "    out->recv(\n"
                "        recvRank, slot, outOffsetPerRank[recvRank], outLengthPerRank[recvRank]);\n"
                "  }\n",
                "    int recvRank = (myRank + worldSize - i) % worldSize;\n"
                "    out->recv(\n"
                "        recvRank, slot, outOffsetPerRank[recvRank], outLengthPerRank[recvRank]);\n"
                "  }\n"
                "  for (int i = 1; i < worldSize; i++) {\n"
                "    int sendRank = (myRank + i) % worldSize;\n"
                "    in->send(\n"
                "        sendRank, slot, inOffsetPerRank[sendRank], inLengthPerRank[sendRank]);\n"
                "  }\n",
            ),
            Edit(
                "third_party/gloo/gloo/allgatherv.cc",
                "      out->send(sendRank, slot, byteOffsets[sendIndex], byteCounts[sendIndex]);\n"
                "      out->recv(recvRank, slot, byteOffsets[recvIndex], byteCounts[recvIndex]);\n"
                "      continue;\n",
                "      out->recv(recvRank, slot, byteOffsets[recvIndex], byteCounts[recvIndex]);\n"
                "      out->send(sendRank, slot, byteOffsets[sendIndex], byteCounts[sendIndex]);\n"
                "      continue;\n",
            ),
        ),
    ),
    Mend(
        "gloo-interface",
        "process sets used an interface that is never set, so the host's name was resolved, often to loopback",
        (
            Edit(
                "horovod/common/gloo/gloo_context.cc",
                'assuming single process execution";\n  }\n\n  attr device_attr;\n  device_attr.iface = gloo_iface_;\n'
                "  device_attr.ai_family = AF_UNSPEC;\n  auto dev = CreateDevice(device_attr);\n\n"
                "  global_ctx = global_context.ctx;\n",
                'assuming single process execution";\n  }\n\n  attr device_attr;\n'
                "  device_attr.iface = global_context.gloo_iface_;\n"
                "  device_attr.ai_family = AF_UNSPEC;\n  auto dev = CreateDevice(device_attr);\n\n"
                "  global_ctx = global_context.ctx;\n",
            ),
        ),
    ),
    Mend(
        "torch-wait",
        "who waited for a collective asked for it without a pause, which took a processor from those that carry it",
        (
            Edit(
                "horovod/torch/handle_manager.h",
                "#include <atomic>\n",
                "#include <atomic>\n#include <condition_variable>\n",
            ),
            Edit(
                "horovod/torch/handle_manager.h",
                "  bool PollHandle(int handle);\n",
                "  bool PollHandle(int handle);\n  void Wait(int handle);\n",
            ),
            Edit(
                "horovod/torch/handle_manager.h",
                "  std::mutex mutex_;\n",
                "  std::mutex mutex_;\n  std::condition_variable done_;\n",
            ),
            Edit(
                "horovod/torch/handle_manager.cc",
                "  results_[handle] = std::make_shared<Status>(status);\n}\n",
                "  results_[handle] = std::make_shared<Status>(status);\n  done_.notify_all();\n}\n\n"
                "void HandleManager::Wait(int handle) {\n"
                "  std::unique_lock<std::mutex> lock(mutex_);\n"
                "  done_.wait(lock, [&] {\n"
                "    auto found = results_.find(handle);\n"
                "    return found == results_.end() || found->second != nullptr;\n"
                "  });\n"
                "}\n",
            ),
            Edit(
                "horovod/torch/handle_manager.cc",
                "  results_.clear();\n",
                "  results_.clear();\n  done_.notify_all();\n",
            ),
            Edit(
                "horovod/torch/mpi_ops_v2.cc",
                "      py::gil_scoped_release release_python_gil;\n      std::this_thread::yield();\n",
                "      py::gil_scoped_release release_python_gil;\n      handle_manager.Wait(handle);\n",
            ),
        ),
    ),
    Mend(
        "torch-fork",
        "its background thread took a new Python thread state, without the GIL, if it was the last to hold a tensor; "
        "a process forked off then (a DataLoader's worker) waited for its lock for ever, until Python 3.12",
        (
            Edit(
                "horovod/torch/handle_manager.cc",
                '#include "handle_manager.h"\n',
                '#include <Python.h>\n\n#include "handle_manager.h"\n',
            ),
            Edit(
                "horovod/torch/handle_manager.cc",
                "void HandleManager::MarkDone(int handle, const Status& status) {\n",
                "static void KeepThreadState() {\n"
                "  static thread_local bool kept = false;\n"
                "  if (!kept && Py_IsInitialized()) {\n"
                "    kept = true;\n"
                "    PyGILState_Ensure();\n"
                "    PyEval_SaveThread();\n"
                "  }\n"
                "}\n\n"
                "void HandleManager::MarkDone(int handle, const Status& status) {\n"
                "  KeepThreadState(); // before the lock: who has the GIL may wait for that\n",
            ),
        ),
    ),
    Mend(
        "sysconfig",
        "Python 3.12 has no distutils",
        (
            Edit(
                "horovod/torch/CMakeLists.txt",
                "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
                "import sysconfig; print(sysconfig.get_paths()['include'])",
            ),
            Edit(
                "horovod/runner/js_run.py",
                "from distutils.spawn import find_executable\n",
                "from shutil import which as find_executable\n",
            ),
        ),
    ),
    Mend(
        "release",
        "debug symbols double the time to build and are nine tenths of the wheel",
        (Edit("setup.py", "else 'RelWithDebInfo'\n", "else 'Release'\n"),),
    ),
    Mend(
        "cmake4",
        "CMake 4 refuses what declares a minimum below 3.5",
        (Edit("third_party/gloo/CMakeLists.txt", "VERSION 2.8.12 FATAL_ERROR", "VERSION 3.5 FATAL_ERROR"),),
    ),
    Mend(
        "openmpi5",
        "Open MPI 5 takes -bind-to for -b and its value for the program, so that plain horovodrun fails",
        (
            Edit(
                "horovod/runner/mpi_run.py",
                "return list(_OMPI_FLAGS), list(_NO_BINDING_ARGS), _OMPI_IMPL",
                "return list(_OMPI_FLAGS), ['--bind-to none', '--map-by slot'], _OMPI_IMPL",
            ),
        ),
    ),
    Mend(
        "relocatable",
        "the libraries looked for MPI in the environment they were built in; a cached wheel goes into another one",
        (
            Edit(
                "CMakeLists.txt",
                "set(CMAKE_CXX_EXTENSIONS OFF)\n",
                "set(CMAKE_CXX_EXTENSIONS OFF)\nset(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
                'set(CMAKE_INSTALL_RPATH "$ENV{HOROVOD_RPATH}")\n',
            ),
        ),
    ),
    Mend(
        "build-record",
        "what it was built with and from goes into the wheel, for hvdlm doctor",
        (
            Edit(
                "setup.py",
                "packages=find_packages(),\n",
                "packages=find_packages(),\n      package_data={'horovod': ['hvdlm_build.json']},\n",
            ),
        ),
    ),
)
"""Every mend, in the order in which they are applied."""


def select_mends(conditions: Collection[str]) -> tuple[Mend, ...]:
    """The mends of a build.

    Args:
        conditions: Those that hold, of ``cpu`` (no GPU operations) and ``avx`` (the processor has AVX and F16C).
    """
    return tuple(mend for mend in MENDS if not mend.needs or mend.needs in conditions)
