"""The Triton kernels: one file for each operation that has one, beside the C of `csrc/`.

`kernels/<operation>.py` holds the equation, the reference and the public function and imports its file here when it
first meets a GPU: importing Triton takes half a second that a server on the CPU need not spend.
"""
