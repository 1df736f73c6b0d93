"""Numbers of the 7-series integrated block for PCI Express, in its AXI4-Stream wrapper, as the RTL reads them. [PG054]"""

RX_USER, TX_USER = 22, 4  # width of the sideband buses

# Places in m_axis_rx_tuser. is_sof, is_eof: a byte of the beat in 4 bits, then a flag.
RX_BAR_HIT, RX_SOF, RX_EOF = 2, 10, 17
BAR_HIT_BITS, PLACE_BITS = 8, 4

TX_DISCONTINUE = 3  # of s_axis_tx_tuser

COMMAND_MASTER = 2  # bit of cfg_command: Bus Master Enable
CAPABILITIES = 0xA8  # where the user's capabilities begin that the block leaves to the user, to the end of the first 256 bytes
