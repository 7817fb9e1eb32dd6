"""The execution engine on Unicorn, behind the protocol of `vtx.x86.execution`; nothing else imports unicorn.

Reading order: `native`, `layout`, `selfcheck`, `code_kind`, `guards`, `code_view`, `clock`, `context`, `coherence`,
then `unicorn_engine`.
"""
