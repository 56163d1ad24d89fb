//! The transfer of snapshots: packing rows into chunks, and unpacking and checking them.
//!
//! A chunk is an LZ4 block of rows with a checksum; the checksum is seeded with the chunk's number,
//! so a missing, repeated or moved chunk is detected like a damaged one. [`SnapshotDecoder`] also
//! requires ascending rows: they go straight into a sorted file.

use bytes::Bytes;
use engine::codec::{Malformed, Reader, put_bytes};
use engine::ids::{Slots, StoreBoot};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::Invalid;
use crate::common::WireField;
use crate::wire::{self, snapshot_part};

/// The largest size of a chunk, unpacked, in bytes. A row is never larger than a shard record.
pub const CHUNK_BYTES_MAX: usize = 4 << 20;
/// A chunk is closed once it has this many bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// Packs ascending rows into chunks.
#[derive(Debug, Default)]
pub struct SnapshotEncoder {
    raw: Vec<u8>,
    chunks: u64,
    rows: u64,
}

impl SnapshotEncoder {
    /// Adds a row. Returns a chunk, ready to be sent, once it is full.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Option<wire::SnapshotPart> {
        put_bytes(&mut self.raw, key);
        put_bytes(&mut self.raw, value);
        self.rows += 1;
        (self.raw.len() >= CHUNK_BYTES).then(|| self.close())
    }

    /// Returns the last chunk, if it has rows, and the end.
    pub fn finish(mut self) -> Vec<wire::SnapshotPart> {
        let mut parts = Vec::new();
        if !self.raw.is_empty() {
            parts.push(self.close());
        }
        let end = wire::SnapshotEnd { chunks: self.chunks, rows: self.rows };
        parts.push(wire::SnapshotPart { kind: Some(snapshot_part::Kind::End(end)) });
        parts
    }

    fn close(&mut self) -> wire::SnapshotPart {
        let chunk = wire::SnapshotChunk {
            rows: lz4_flex::block::compress(&self.raw).into(),
            raw_bytes: self.raw.len() as u32,
            sum: xxh3_64_with_seed(&self.raw, self.chunks),
        };
        self.raw.clear();
        self.chunks += 1;
        wire::SnapshotPart { kind: Some(snapshot_part::Kind::Chunk(chunk)) }
    }
}

/// The content of one part of the stream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SnapshotEvent {
    /// The first part. `open` is not accepted yet.
    Header {
        /// The version and cluster of the sender, with its number of the `Follow` connection.
        open: wire::Open,
        /// The sender.
        from: StoreBoot,
        /// The receiver.
        to: StoreBoot,
        /// The number of the transfer.
        transfer: u64,
        /// The shard's range.
        slots: Slots,
        /// The row of the shard itself, as `engine::store::layout` encodes it.
        shard_record: Bytes,
    },
    /// Ascending rows, above all rows before them.
    Rows(Vec<(Bytes, Bytes)>),
    /// The snapshot is complete.
    End,
}

/// Decodes a stream of parts and checks that it is complete and in order.
#[derive(Debug, Default)]
pub struct SnapshotDecoder {
    begun: bool,
    ended: bool,
    chunks: u64,
    rows: u64,
    last_key: Bytes,
}

impl SnapshotDecoder {
    /// Decodes the next part. After an error the snapshot must be discarded.
    pub fn take(&mut self, part: wire::SnapshotPart) -> Result<SnapshotEvent, Invalid> {
        let kind = part.kind.ok_or(Invalid::Missing("snapshot_part.kind"))?;
        let is_header = matches!(kind, snapshot_part::Kind::Header(_));
        if is_header == self.begun || self.ended {
            return Err(Invalid::Range("snapshot_part: order"));
        }
        match kind {
            snapshot_part::Kind::Header(header) => {
                self.begun = true;
                Ok(SnapshotEvent::Header {
                    open: header.open.ok_or(Invalid::Missing("header.open"))?,
                    from: WireField::from_wire("header.from", header.from)?,
                    to: WireField::from_wire("header.to", header.to)?,
                    transfer: header.transfer,
                    slots: WireField::from_wire("slots", header.slots)?,
                    shard_record: header.shard_record,
                })
            }
            snapshot_part::Kind::Chunk(chunk) => Ok(SnapshotEvent::Rows(self.unpack(chunk)?)),
            snapshot_part::Kind::End(end) => {
                if (end.chunks, end.rows) != (self.chunks, self.rows) {
                    return Err(Invalid::Range("end: not as many rows as were sent"));
                }
                self.ended = true;
                Ok(SnapshotEvent::End)
            }
        }
    }

    fn unpack(&mut self, chunk: wire::SnapshotChunk) -> Result<Vec<(Bytes, Bytes)>, Invalid> {
        let raw_bytes = chunk.raw_bytes as usize;
        if raw_bytes > CHUNK_BYTES_MAX {
            return Err(Invalid::Range("chunk.raw_bytes"));
        }
        let raw = lz4_flex::block::decompress(&chunk.rows, raw_bytes)
            .map_err(|_| Invalid::Malformed { field: "chunk.rows", why: Malformed("lz4 block") })?;
        if raw.len() != raw_bytes || xxh3_64_with_seed(&raw, self.chunks) != chunk.sum {
            return Err(Invalid::Malformed { field: "chunk.rows", why: Malformed("sum") });
        }
        let rows = self.rows_of(raw.into())?;
        self.chunks += 1;
        self.rows += rows.len() as u64;
        Ok(rows)
    }

    fn rows_of(&mut self, raw: Bytes) -> Result<Vec<(Bytes, Bytes)>, Invalid> {
        let malformed = |why| Invalid::Malformed { field: "chunk.rows", why };
        let mut from = Reader::new(raw);
        let mut rows = Vec::new();
        while !from.is_empty() {
            let key = from.bytes("key").map_err(malformed)?;
            let value = from.bytes("value").map_err(malformed)?;
            if key <= self.last_key {
                return Err(malformed(Malformed("key order")));
            }
            self.last_key = key.clone();
            rows.push((key, value));
        }
        // A slice as key would keep the whole chunk in memory until the next one.
        self.last_key = Bytes::copy_from_slice(&self.last_key);
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::ids::{Boot, StoreId};

    fn header() -> wire::SnapshotPart {
        let boot = StoreBoot { store: StoreId(5), boot: Boot(1) };
        let header = wire::SnapshotHeader {
            open: Some(wire::Open::new(1, 2)),
            from: Some(boot.into()),
            to: Some(boot.into()),
            transfer: 3,
            slots: Some(Slots::ALL.into()),
            shard_record: Bytes::from_static(b"record"),
        };
        wire::SnapshotPart { kind: Some(snapshot_part::Kind::Header(header)) }
    }

    /// 40,000 rows of about 70 bytes: three chunks.
    fn rows() -> Vec<(Bytes, Bytes)> {
        let row = |i: u32| {
            let key = i.to_be_bytes().repeat(16);
            (Bytes::from(key), Bytes::from(i.to_string()))
        };
        (1..=40_000).map(row).collect()
    }

    fn parts() -> Vec<wire::SnapshotPart> {
        let mut writer = SnapshotEncoder::default();
        let mut parts = vec![header()];
        for (key, value) in rows() {
            parts.extend(writer.push(&key, &value));
        }
        parts.extend(writer.finish());
        parts
    }

    fn read(parts: Vec<wire::SnapshotPart>) -> Result<Vec<(Bytes, Bytes)>, Invalid> {
        let mut reader = SnapshotDecoder::default();
        let mut rows = Vec::new();
        let mut ended = false;
        for part in parts {
            match reader.take(part)? {
                SnapshotEvent::Rows(more) => rows.extend(more),
                SnapshotEvent::End => ended = true,
                SnapshotEvent::Header { transfer, .. } => assert_eq!(transfer, 3),
            }
        }
        assert!(ended, "the end came");
        Ok(rows)
    }

    #[test]
    fn a_snapshot_crosses_whole() {
        assert!(parts().len() >= 4, "header, chunks, end");
        assert_eq!(read(parts()), Ok(rows()));
    }

    #[track_caller]
    fn refused(break_it: impl FnOnce(&mut Vec<wire::SnapshotPart>)) {
        let mut parts = parts();
        break_it(&mut parts);
        assert!(read(parts).is_err());
    }

    #[track_caller]
    fn chunk(part: &mut wire::SnapshotPart) -> &mut wire::SnapshotChunk {
        match part.kind.as_mut() {
            Some(snapshot_part::Kind::Chunk(chunk)) => chunk,
            other => panic!("no chunk: {other:?}"),
        }
    }

    #[test]
    fn an_incomplete_snapshot_is_refused() {
        refused(|parts| drop(parts.remove(0)));
        refused(|parts| drop(parts.remove(1)));
        refused(|parts| parts.swap(1, 2));
        refused(|parts| parts.insert(1, parts[1].clone()));
        refused(|parts| parts.insert(1, header()));
        refused(|parts| parts.push(header()));
        refused(|parts| drop(parts.remove(parts.len() - 2)));
        refused(|parts| parts[1].kind = None);
        refused(|parts| match parts[0].kind.as_mut() {
            Some(snapshot_part::Kind::Header(header)) => header.open = None,
            other => panic!("no header: {other:?}"),
        });
    }

    #[test]
    fn a_damaged_chunk_is_refused() {
        refused(|parts| chunk(&mut parts[1]).sum ^= 1);
        refused(|parts| chunk(&mut parts[1]).raw_bytes -= 1);
        refused(|parts| chunk(&mut parts[1]).raw_bytes = u32::MAX);
        refused(|parts| chunk(&mut parts[1]).rows = Bytes::from_static(b"\xff\xff\xff"));
    }

    /// The checksum is correct, so the sender has sent it like that.
    #[test]
    fn a_row_that_is_cut_short_is_refused() {
        let mut row = Vec::new();
        put_bytes(&mut row, b"key");
        put_bytes(&mut row, b"value");
        for end in 1..row.len() {
            let mut writer =
                SnapshotEncoder { raw: row[..end].to_vec(), ..SnapshotEncoder::default() };
            let cut = writer.close();
            let refused = read(vec![header(), cut]).unwrap_err();
            assert!(matches!(refused, Invalid::Malformed { field: "chunk.rows", .. }), "{refused}");
        }
    }

    #[test]
    fn rows_out_of_order_are_refused() {
        let mut writer = SnapshotEncoder::default();
        assert_eq!(writer.push(b"b", b""), None);
        assert_eq!(writer.push(b"a", b""), None);
        let mut parts = writer.finish();
        parts.insert(0, header());
        assert!(read(parts).is_err());
    }
}
