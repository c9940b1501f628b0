"""What was learnt, used: the module FedCLIP; predict, evaluate, encode, export, ONNX, the model card.

May import everything up to report. The package itself hands on FedCLIP, which brings the hub's library, when asked.
"""
