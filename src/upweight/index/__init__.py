"""Index: rows of training examples on disk, whose product with a query's row is its score.

codes       a row in few bits
scan        products of queries with a shard of rows
kernel      the compiled part of it
"""
