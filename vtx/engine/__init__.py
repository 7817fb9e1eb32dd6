"""The execution engine on Unicorn, behind the protocol of `vtx.x86.execution`; nothing else imports unicorn.

Reading order: `native`, `layout`, `selfcheck`, `code_view`, `clock`, `context`, `coherence`, `unicorn_engine`.
"""
