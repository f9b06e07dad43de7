"""Names of modules with underscores in the place of dots, as kohya's trainers write them, and back.

A name of several words (`to_q`, `down_blocks`) has underscores of its own, so that dots come back by a list of words.
What the modules are is not known here.
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

_PARTS = {tuple(word.split("_")) for word in _WORDS.split()}
_LONGEST = max(map(len, _PARTS))


@cache
def dotted(name: str) -> str | None:
    """`down_blocks_0_attentions_1` → `down_blocks.0.attentions.1`; None where a word is not on the list."""
    parts, at, found = name.split("_"), 0, []
    while at < len(parts):
        for size in range(min(_LONGEST, len(parts) - at), 0, -1):
            word = tuple(parts[at : at + size])
            if word in _PARTS or (size == 1 and word[0].isdecimal()):
                break
        else:
            return None
        found.append("_".join(word))
        at += size
    return ".".join(found)


def underscored(name: str) -> str:
    """The inverse of `dotted`."""
    return name.replace(".", "_")
