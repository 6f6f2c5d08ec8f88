"""What reads the kernels without running them, and what runs them on a GPU for the first time.

python -m tools.static     every kernel compiled for every GPU: machine code, bounds, a model, and what is asked of it
python -m tools.cubin      the same of one cubin
python -m tools.gpu        the GPU kit (make gpu: tools.gpu_setup);  python -m tools.gpu_minute: what one minute tells
"""
