"""Peer models for a drop-in comparison: what fairseq lacks, and its own made safe to use."""

from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.fertility_nat import FertilityNAT
from fairseq_vqem.peers.losses import CTCNATLoss, FertilityNATLoss

__all__ = ["CTCNAT", "CTCNATLoss", "FertilityNAT", "FertilityNATLoss"]
