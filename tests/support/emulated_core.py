"""The CUDA sources compiled by g++ (conftest's emulation_library), called like the compiled core."""

import ctypes


class EmulatedCore:
    """The functions of csrc/cuda/launch.h without their prefix, on the host's memory."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def cuda_current_device(self):
        return 0

    def __getattr__(self, name):
        function = self.library[f"dc_{name}"]
        function.restype = ctypes.c_char_p

        def call(*values):
            arguments = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values]
            message = self.launch(lambda: function(*arguments))
            return message and message.decode()
        return call

    def launch(self, work):
        return work()
