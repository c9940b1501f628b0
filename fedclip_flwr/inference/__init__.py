"""What was learnt, used: the module FedCLIP; predict, evaluate, encode, export, ONNX, the model card.

May import everything up to report.
"""

from fedclip_flwr.inference.model import FedCLIP, Prediction

__all__ = ["FedCLIP", "Prediction"]
