"""Peer models for a drop-in comparison: what fairseq lacks, and its own made safe to use."""

from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.dag_nat import DAGNAT
from fairseq_vqem.peers.fertility_nat import FertilityNAT
from fairseq_vqem.peers.losses import CTCNATLoss, DAGNATLoss, FertilityNATLoss

__all__ = ["CTCNAT", "DAGNAT", "CTCNATLoss", "DAGNATLoss", "FertilityNAT", "FertilityNATLoss"]
