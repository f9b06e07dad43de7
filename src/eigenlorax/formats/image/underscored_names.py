"""Conversion of module names with underscores instead of dots, as kohya's trainers write them.

Some components contain underscores themselves (`to_q`, `down_blocks`), so the dots are restored with a list of these.
"""

from functools import cache

_WORDS = """
down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers conv conv1 conv2 conv_in conv_out
conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 cond_proj encoder_hid_proj
transformer_blocks proj proj_in proj_out attn1 attn2 attn attn3 to_q to_k to_v to_out ff net norm1 norm2 norm3
add_q_proj add_k_proj add_v_proj to_add_out
input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op time_embed label_emb out
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings
token_embedding position_embedding
double_blocks single_blocks img_attn txt_attn qkv img_mlp txt_mlp img_mod txt_mod lin linear1 linear2 modulation
img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer linear adaLN_modulation
single_transformer_blocks x_embedder context_embedder time_text_embed timestep_embedder text_embedder
guidance_embedder norm norm_out proj_mlp norm1_context ff_context
block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo
"""

_COMPONENTS = {tuple(word.split("_")) for word in _WORDS.split()}
_LONGEST = max(map(len, _COMPONENTS))


@cache
def dotted(name: str) -> str | None:
    """Return `down_blocks.0.attentions.1` for `down_blocks_0_attentions_1`; None if a component is not on the list.

    The longest component that matches is taken at each position.
    """
    words, position, components = name.split("_"), 0, []
    while position < len(words):
        for size in range(min(_LONGEST, len(words) - position), 0, -1):
            candidate = tuple(words[position : position + size])
            if candidate in _COMPONENTS or (size == 1 and candidate[0].isdecimal()):
                break
        else:
            return None
        components.append("_".join(candidate))
        position += size
    return ".".join(components)


def underscored(name: str) -> str:
    """Return the name with underscores instead of dots, the inverse of `dotted`."""
    return name.replace(".", "_")
