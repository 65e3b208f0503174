"""Decoding: drafts, their verification, and the rounds that make images of them.

Read it in this order: `reference` (the algorithm on one page, for one image), `decoder` and `batch` (the same for a
batch, round by round), `exact` and `paper` (how drafts are judged, and what replaces the rejected ones), `session`
(what is launched), `chain_plan` and `path_means` (how chains run on static buffers), `head` and `model` (the
networks), `draft_length` (how far to draft). `round` holds what passes between them. The letters of shapes are in
`specdec_rt.types`, the mathematics is in docs/algorithm.md.
"""
