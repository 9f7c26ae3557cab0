"""The models of a run: the policy that is trained, its anchors, and how their log-probs are made.

Begin with `pair.PolicyPair`, the one object that the training loop asks for log-probs. On the way
there, `layout` turns bundles into rows of tokens, `module` runs the backbone over them, and `head`
turns hidden states into log-probs. `reference` holds the anchors, `packing` makes attention cheap
on a CPU, `sharding` spreads weights over processes, `store` keeps reference log-probs on disk.
`load` builds a pair from a recipe, `scorer` is the counterpart for reward and preference models,
`export` writes weights for a sampling engine, and `tabular` has policies small enough to enumerate.
"""
