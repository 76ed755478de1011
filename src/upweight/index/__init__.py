"""Index: rows of training examples on disk, whose product with a query's row is its score.

transform   what a row is: T gᵢ, and u_q, so that S[q, i] = u_q · T gᵢ
codes       a row in few bits
scan        products of queries with a shard of rows
kernel      the compiled part of it
shards      rows on disk: built by one process or several, resumed, appended to
asking      a question to a fitted method, answered from the rows
index       all of it behind one class
"""
