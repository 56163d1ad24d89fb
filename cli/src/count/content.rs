//! What an input holds, by its first bytes: text, compressed text, or what has no lines to count.
//!
//! Names are not looked at: a pipe has none, and `access.log.1` may be compressed or not. What is recognised is
//! decompressed on the way; nothing is unpacked twice. Bytes that are no text are refused, since each of their "lines"
//! would make a counter that nobody can name.

use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};

use crate::output;

/// Enough to find what makes a file binary. A pipe may give less at first.
const BLOCK_BYTES: usize = 64 << 10;
/// More than any preset of xz asks for (`-9`: 65 MiB): a stream that asks for more is refused, not obeyed.
const XZ_MEMORY_BYTES_MAX: u64 = 256 << 20;

/// What may be done with an input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taking {
    pub(super) decompress: bool,
    /// Whatever it holds, its bytes are keys.
    pub(super) binary: bool,
}

/// Why an input is not counted at all. The user can do something about it.
#[derive(Debug)]
pub(super) struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

pub(super) fn refused(why: String) -> io::Error {
    io::Error::other(Refused(why))
}

pub(super) fn is_refused(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Refused>())
}

/// A compression that is undone on the way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Compression {
    Gzip,
    Zstd,
    Bzip2,
    Xz,
}

/// The first bytes of what is decompressed. Bzip2 has two: of a stream with and without blocks; a skippable frame of zstd
/// sixteen, of which pzstd writes the first.
const COMPRESSED: &[(&[u8], Compression)] = &[
    (b"\x1f\x8b\x08", Compression::Gzip),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
    (b"\x50\x2a\x4d\x18", Compression::Zstd),
    (b"BZh?1AY&SY", Compression::Bzip2),
    (b"BZh?\x17\x72\x45\x38\x50\x90", Compression::Bzip2),
    (b"\xfd7zXZ\0", Compression::Xz),
];

/// The first bytes of what has to be unpacked by other programs, and one that writes the text to a pipe.
const PACKED: &[(&[u8], &str, &str)] = &[
    (b"PK\x03\x04", "a zip archive", "unzip -p"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -so"),
    (b"Rar!\x1a\x07", "a rar archive", "unrar p -inul"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x1f\x9d", "compress (.Z)", "zcat"),
    (b"LZIP\x01", "lzip", "lzip -dc"),
    (b"\x89LZO\0", "lzop", "lzop -dc"),
    (b"\xff\x06\0\0sNaPpY", "snappy", "snzip -dc"),
    (b"\x5d\0\0", "lzma", "xz -dc"),
];

/// Byte order marks of what has to be converted. The longer one first: it begins like the other.
const ENCODED: &[(&[u8], &str)] = &[
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
];

const UTF_8_MARK: &[u8] = b"\xef\xbb\xbf";

impl fmt::Display for Compression {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
        })
    }
}

impl Compression {
    fn of(first: &[u8]) -> Option<Self> {
        let found = COMPRESSED.iter().find(|(magic, _)| begins_with(first, magic))?;
        Some(found.1)
    }

    /// All members, streams or frames of it, one after the other.
    fn decoder<'a>(
        self,
        input: Box<dyn BufRead + Send + 'a>,
    ) -> io::Result<Box<dyn Read + Send + 'a>> {
        let xz = liblzma::stream::Stream::new_stream_decoder;
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
            Self::Xz => {
                let stream = xz(XZ_MEMORY_BYTES_MAX, liblzma::stream::CONCATENATED)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
            }
        })
    }
}

/// Text that was compressed. An error of it says so.
struct Decompressed<'a> {
    compression: Compression,
    decoder: Box<dyn Read + Send + 'a>,
}

impl Read for Decompressed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(bytes).map_err(|error| {
            if error.kind() == io::ErrorKind::Interrupted {
                return error;
            }
            let what = format!(
                "this {} data can't be decompressed: {error} (is it cut off or damaged?)",
                self.compression
            );
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }
}

/// Whether bytes begin so; `?` in `magic` is a digit.
fn begins_with(bytes: &[u8], magic: &[u8]) -> bool {
    bytes.len() >= magic.len() && may_begin_with(bytes, magic)
}

/// Whether they would, if more of them came.
fn may_begin_with(bytes: &[u8], magic: &[u8]) -> bool {
    bytes.iter().zip(magic).all(|(byte, want)| match want {
        b'?' => byte.is_ascii_digit(),
        _ => byte == want,
    })
}

/// Whether too few bytes are here to say what they are.
fn is_undecided(first: &[u8]) -> bool {
    let compressed = COMPRESSED.iter().map(|(magic, _)| *magic);
    let packed = PACKED.iter().map(|(magic, ..)| *magic);
    let marked = ENCODED.iter().map(|(mark, _)| *mark).chain([UTF_8_MARK]);
    let mut all = compressed.chain(packed).chain(marked);
    all.any(|magic| first.len() < magic.len() && may_begin_with(first, magic))
}

/// The first bytes of an input: what one read gives, and more only while they could be anything. An error comes behind them.
fn first_block(input: &mut impl Read) -> (Vec<u8>, Failed) {
    let mut block = vec![0; BLOCK_BYTES];
    let (mut filled, mut failed) = (0, Failed(None));
    while is_undecided(&block[..filled]) {
        match input.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                failed = Failed(Some(error));
                break;
            }
        }
    }
    block.truncate(filled);
    (block, failed)
}

/// Gives an error once, if there was one.
struct Failed(Option<io::Error>);

impl Read for Failed {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        self.0.take().map_or(Ok(0), Err)
    }
}

impl BufRead for Failed {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.take().map_or(Ok(&[]), Err)
    }

    fn consume(&mut self, _: usize) {}
}

/// An input whose first bytes were looked at.
pub(super) enum Opened<'a> {
    /// As it is.
    Plain(Box<dyn BufRead + Send + 'a>),
    Decompressed(Box<dyn BufRead + Send + 'a>),
}

/// Looks at an input, and gives its text from the first byte on.
pub(super) fn open<'a>(
    mut input: impl BufRead + Send + 'a,
    taking: Taking,
) -> io::Result<Opened<'a>> {
    let (first, failed) = first_block(&mut input);
    let Some(compression) = Compression::of(&first) else {
        return Ok(Opened::Plain(joined(text_of(first, taking)?, failed, input)));
    };
    if !taking.decompress {
        let first = compressed_as_it_is(first, compression, taking)?;
        return Ok(Opened::Plain(joined(first, failed, input)));
    }
    let decoder = compression.decoder(joined(first, failed, input))?;
    let mut text = Decompressed { compression, decoder };
    let (first, failed) = first_block(&mut text);
    if let Some(inner) = Compression::of(&first) {
        let why = format!("is compressed twice, {inner} within {compression}: unpack it once");
        return Err(refused(why));
    }
    let rest = BufReader::with_capacity(BLOCK_BYTES, text);
    Ok(Opened::Decompressed(joined(text_of(first, taking)?, failed, rest)))
}

fn joined<'a>(
    first: Vec<u8>,
    failed: Failed,
    rest: impl BufRead + Send + 'a,
) -> Box<dyn BufRead + Send + 'a> {
    Box::new(Cursor::new(first).chain(failed).chain(rest))
}

fn compressed_as_it_is(
    first: Vec<u8>,
    compression: Compression,
    taking: Taking,
) -> io::Result<Vec<u8>> {
    if taking.binary {
        return Ok(first);
    }
    Err(refused(format!(
        "is {compression} data: with --no-decompress it counts only with --binary"
    )))
}

/// The first lines of a file that is followed, without a mark.
pub(super) fn followed(first: Vec<u8>, taking: Taking) -> io::Result<Vec<u8>> {
    match Compression::of(&first).filter(|_| !taking.binary) {
        Some(compression) => {
            Err(refused(format!("is {compression} data, which can't be followed")))
        }
        None => text_of(first, taking),
    }
}

/// The first bytes of a text without its mark.
fn text_of(mut first: Vec<u8>, taking: Taking) -> io::Result<Vec<u8>> {
    if taking.binary {
        return Ok(first);
    }
    if let Some((_, what, unpack)) = PACKED.iter().find(|(magic, ..)| begins_with(&first, magic)) {
        let why = format!("is {what}, which is not unpacked here: {unpack} FILE | dkc count NS -");
        return Err(refused(why));
    }
    if let Some((_, name)) = ENCODED.iter().find(|(mark, _)| begins_with(&first, mark)) {
        return Err(refused(format!(
            "is {name}, by its byte order mark: iconv -f {name} -t UTF-8 FILE | dkc count NS -"
        )));
    }
    if first.contains(&0) {
        return Err(refused(
            "is binary (it has NUL bytes): --binary counts its lines all the same; if it is UTF-16 without a mark: iconv \
             -f UTF-16LE -t UTF-8 FILE | dkc count NS -"
                .to_owned(),
        ));
    }
    if begins_with(&first, UTF_8_MARK) {
        output::note("skipped a UTF-8 byte order mark at the begin of the input");
        first.drain(..UTF_8_MARK.len());
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const USUAL: Taking = Taking { decompress: true, binary: false };
    const AS_IT_IS: Taking = Taking { decompress: false, binary: true };

    /// Gives one byte a read, as a slow pipe may.
    struct Drops<'a>(&'a [u8]);

    impl Read for Drops<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            let length = bytes.len().min(1);
            self.0.read(&mut bytes[..length])
        }
    }

    /// What comes out, and the error behind it.
    fn read(input: &[u8], taking: Taking) -> (Vec<u8>, Option<io::Error>) {
        let mut text = Vec::new();
        let opened = open(BufReader::with_capacity(16, Drops(input)), taking);
        let error = match opened {
            Ok(Opened::Plain(mut input) | Opened::Decompressed(mut input)) => {
                input.read_to_end(&mut text).err()
            }
            Err(error) => Some(error),
        };
        (text, error)
    }

    #[track_caller]
    fn check(input: &[u8], want: &[u8]) {
        let (text, error) = read(input, USUAL);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(text, want);
    }

    #[track_caller]
    fn check_refused(input: &[u8], taking: Taking, want: &str) {
        let error = open(input, taking).err().expect("it is refused");
        assert!(is_refused(&error), "{error}");
        assert!(error.to_string().contains(want), "{error}");
    }

    fn compress(compression: Compression, text: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        match compression {
            Compression::Gzip => {
                let level = flate2::Compression::default();
                let mut encoder = flate2::write::GzEncoder::new(&mut packed, level);
                encoder.write_all(text).unwrap();
                encoder.finish().unwrap();
            }
            Compression::Zstd => packed = zstd::encode_all(text, 3).unwrap(),
            Compression::Bzip2 => {
                let level = bzip2::Compression::default();
                let mut encoder = bzip2::write::BzEncoder::new(&mut packed, level);
                encoder.write_all(text).unwrap();
                encoder.finish().unwrap();
            }
            Compression::Xz => packed = liblzma::encode_all(text, 6).unwrap(),
        }
        packed
    }

    const ALL: [Compression; 4] =
        [Compression::Gzip, Compression::Zstd, Compression::Bzip2, Compression::Xz];

    #[test]
    fn text_is_taken_as_it_is() {
        check(b"", b"");
        check(b"a\nb\n", b"a\nb\n");
        // Begins of what could have been something else.
        for text in
            [&b"B"[..], b"BZh9 is a word\n", b"\x1f", b"PK\n", b"LZIP\n", b"\xef\xbb", b"\xff"]
        {
            check(text, text);
        }
    }

    #[test]
    fn what_is_compressed_is_unpacked() {
        for compression in ALL {
            for text in [&b""[..], b"a\nb\n", &b"line\n".repeat(100_000)] {
                check(&compress(compression, text), text);
            }
            // Members one after the other, as logrotate's and pzstd's.
            let two = [compress(compression, b"a\nb"), compress(compression, b"c\n")].concat();
            check(&two, b"a\nbc\n");
        }
        let skippable = [
            b"\x50\x2a\x4d\x18\x04\0\0\0\x01\x02\x03\x04",
            &compress(Compression::Zstd, b"a\n")[..],
        ];
        check(&skippable.concat(), b"a\n");
    }

    #[test]
    fn what_is_damaged_or_cut_off_is_named() {
        let text: Vec<u8> =
            (0..50_000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
        for compression in ALL {
            let packed = compress(compression, &text);
            let cut_off = &packed[..packed.len() - 5];
            let mut damaged = packed.clone();
            let middle = packed.len() / 2;
            damaged[middle..middle + 40].fill(0x55);
            for input in [cut_off, &damaged] {
                let (got, error) = read(input, USUAL);
                let error = error.expect("an error").to_string();
                assert!(error.contains(&format!("this {compression} data can't be")), "{error}");
                assert!(got.len() <= text.len());
            }
            let behind = [&packed[..], b"\x01\x02\x03 no member of it"].concat();
            if compression != Compression::Bzip2 {
                assert!(read(&behind, USUAL).1.is_some(), "{compression}");
            }
        }
    }

    #[test]
    fn what_is_no_text_is_refused() {
        check_refused(b"a\0b\n", USUAL, "--binary");
        check_refused(b"\x7fELF\x02\x01\x01\0\0", USUAL, "--binary");
        check_refused(b"\xff\xfea\0\n\0", USUAL, "iconv -f UTF-16 -t UTF-8");
        check_refused(b"\xfe\xff\0a\0\n", USUAL, "iconv -f UTF-16 -t UTF-8");
        check_refused(b"\xff\xfe\0\0a\0\0\0", USUAL, "iconv -f UTF-32 -t UTF-8");
        check_refused(b"\0\0\xfe\xff\0\0\0a", USUAL, "iconv -f UTF-32 -t UTF-8");
        check_refused(b"PK\x03\x04\x14", USUAL, "unzip -p");
        check_refused(b"\x1f\x9d\x90abc", USUAL, "zcat");
        for compression in ALL {
            let packed = compress(compression, b"a\n");
            let twice = compress(Compression::Gzip, &packed);
            check_refused(&twice, USUAL, "compressed twice");
            let kept = Taking { decompress: false, binary: false };
            check_refused(&packed, kept, "--no-decompress it counts only with --binary");
            assert_eq!(read(&packed, AS_IT_IS).0, packed);
            check_refused(&compress(compression, b"a\0\n"), USUAL, "--binary");
        }
        assert_eq!(read(b"a\0b\n", AS_IT_IS).0, b"a\0b\n");
        let unpacked = Taking { decompress: true, binary: true };
        assert_eq!(read(&compress(Compression::Xz, b"a\0\n"), unpacked).0, b"a\0\n");
    }

    #[test]
    fn a_mark_is_skipped() {
        check(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", b"a\n\xef\xbb\xbfb\n");
        check(b"\xef\xbb\xbf", b"");
        check(&compress(Compression::Gzip, b"\xef\xbb\xbfa\n"), b"a\n");
        assert_eq!(read(b"\xef\xbb\xbfa\n", AS_IT_IS).0, b"\xef\xbb\xbfa\n");
    }
}
