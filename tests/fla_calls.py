"""The arguments of FLA 0.6.0's functions by position, as `tests/fla` reads them from FLA itself."""

BY_POSITION = {
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute "
    "return_intermediate_states state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs",
    "chunk_kda_fwd": "q k v g beta scale initial_state output_final_state state_v_first cu_seqlens "
    "cu_seqlens_cpu chunk_indices chunk_size safe_gate lower_bound use_gate_in_kernel A_log dt_bias "
    "disable_recompute return_intermediate_states cp_context use_graph chunk_offsets",
    "fused_recurrent_kda": "q k v g beta A_log dt_bias scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound "
    "state_v_first cu_seqlens",
    "fused_recurrent_kda_fwd": "q k v g beta A_log dt_bias initial_state scale output_final_state "
    "inplace_final_state state_v_first cu_seqlens ssm_state_indices num_accepted_tokens "
    "use_qk_l2norm_in_kernel use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound out",
    "naive_recurrent_kda": "q k v g beta scale initial_state output_final_state",
    "naive_chunk_kda": "q k v g beta scale initial_state output_final_state chunk_size",
    "chunk_kda_fwd_intra": "q k v gk beta scale cu_seqlens chunk_size chunk_indices safe_gate lower_bound "
    "disable_recompute use_graph",
    "recompute_w_u_fwd": "k v beta A gk q cu_seqlens chunk_indices use_graph",
    "chunk_gated_delta_rule_fwd_h": "k w u g gk initial_state output_final_state chunk_size save_new_value "
    "state_v_first cu_seqlens cu_seqlens_cpu chunk_indices chunk_offsets",
    "chunk_gla_fwd_o_gk": "q v g A h scale state_v_first cu_seqlens chunk_size chunk_indices use_graph",
    "chunk_kda_bwd": "q k v beta Aqk Akk scale initial_state do dht g g_org state_v_first cu_seqlens "
    "chunk_indices chunk_size safe_gate lower_bound use_gate_in_kernel A_log dt_bias disable_recompute "
    "cp_context use_graph chunk_offsets",
    "chunk_kda_bwd_dAv": "q k v do A scale cu_seqlens chunk_size chunk_indices use_graph",
    "chunk_gated_delta_rule_bwd_dhu": "q k w do dv g gk h0 dht scale state_v_first cu_seqlens chunk_size "
    "chunk_indices chunk_offsets use_graph",
    "chunk_kda_bwd_wy_dqkg_fused": "q k v v_new g beta A h do dh dv scale state_v_first cu_seqlens "
    "chunk_size chunk_indices chunk_offsets use_graph",
    "chunk_kda_bwd_intra": "q k g beta dAqk dAkk dq dk db dg cu_seqlens chunk_indices chunk_size "
    "safe_gate lower_bound use_graph",
    "kda_gate_bwd": "g A_log dt_bias dyg lower_bound",
    "chunk_local_cumsum": "g chunk_size reverse scale cu_seqlens output_dtype chunk_indices use_graph",
    "kda_gate_chunk_cumsum": "g A_log chunk_size scale dt_bias cu_seqlens output_dtype chunk_indices "
    "lower_bound use_graph",
    "kda_gate_fwd": "g A_log dt_bias lower_bound output_dtype",
    "fused_kda_gate": "g A_log dt_bias lower_bound output_dtype",
    "naive_kda_gate": "g A_log dt_bias output_dtype",
    "naive_kda_lowerbound_gate": "g A_log dt_bias lower_bound output_dtype",
    "prepare_lens": "cu_seqlens",
    "prepare_chunk_indices": "cu_seqlens chunk_size cu_seqlens_cpu",
    "prepare_chunk_offsets": "cu_seqlens chunk_size",
}
