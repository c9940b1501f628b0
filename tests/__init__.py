from fedclip_flwr.flower.grids import act_as_server

act_as_server()
