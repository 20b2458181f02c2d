"""What a batch is: the contract between data and model.

A dict of int32 arrays [B, T]:
    input_ids       token ids
    labels          the token after each input token (already shifted), IGNORE_INDEX where there is nothing to predict
    attention_mask  (optional) 1 for a real token, 0 for padding
    segment_ids     (optional) attention stays inside a segment
    positions       (optional) positions for the rotary angles
"""

IGNORE_INDEX = -100
