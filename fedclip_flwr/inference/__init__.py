"""The trained adapter in use: the module FedCLIP; predict, evaluate, encode, export, ONNX, the model card.

May import everything up to report. `fedclip_flwr` imports FedCLIP, and with it the hub's library, on first use.
"""
