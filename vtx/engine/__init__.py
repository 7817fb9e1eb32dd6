"""The execution engine on Unicorn, behind the protocol of `vtx.x86.execution`; nothing else imports unicorn.

The reading guide has its modules in reading order.
"""
