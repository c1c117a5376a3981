"""Which implementation of attention torch takes."""

import torch


def plan_no_attention() -> None:
    """On a Hopper GPU torch prefers cuDNN's attention, which builds a plan for every new shape.

    Sentences have a new shape in nearly every batch, and beam search in every step. In a training
    on an H100 (torch 2.11, 23 subwords a sentence, 2.2 updates a second after 80 of them) the main
    thread spent half of its time in that call. torch's other implementations need no plan; for
    long inputs of one shape cuDNN's would be the faster one.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
