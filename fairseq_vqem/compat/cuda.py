"""Which of CUDA's implementations torch takes."""

import torch


def plan_no_attention() -> None:
    """On a Hopper GPU torch prefers cuDNN's attention, which builds a plan for every new shape.

    Sentences have a new shape in nearly every batch, and beam search in every step. In a training
    on an H100 (torch 2.11, 19 subwords a sentence, 2.2 updates a second after 80 of them) the main
    thread spent half of its time in that call. torch's other implementations need no plan; for
    long inputs of one shape cuDNN's would be the faster one.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def convolve_in_float32() -> None:
    """torch computes matrix products in float32, but convolutions in TF32, with three digits.

    A sentence's codes would then depend on the algorithm that cuDNN takes for its batch's shape.
    """
    torch.backends.cudnn.allow_tf32 = False
