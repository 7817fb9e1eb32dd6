"""Intel's virtual-machine control structures as data, and the pure rules that govern them.

Nothing here knows the machine: the tables and rules stand on their own, so the processor model, the explainer, the
fuzzers, the documentation and the hardware description all read the same records.

Reading order: `bits`, `refs`, `layouts`, `controls`, `fields`, `capabilities`, `instruction_information`,
`qualifications`, `exits`, `region`, and then the rules: `rules.model`, `rules.shapes`, the stages, `rules` itself.
"""
