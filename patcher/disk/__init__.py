"""What every module that touches the disk shares: failures in words, links, the cache folder."""
