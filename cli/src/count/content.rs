//! Detects the kind of an input by its first bytes: text, compressed text, or unsupported data.
//!
//! File names are ignored: a pipe has none, and `access.log.1` may be compressed or not. Recognised
//! compression is undone while the input is read, but only once. Binary data is rejected, since
//! each of its "lines" would become a counter with an unprintable key.

use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};

use crate::exit::UsageError;
use crate::output::note;

/// The bytes that are examined, enough to recognise a binary file. The first read of a pipe may
/// return fewer.
const BLOCK_BYTES: usize = 64 << 10;
/// The memory limit of the xz decoder, more than any preset needs (`-9`: 65 MiB): a stream that
/// needs more is rejected.
const XZ_MEMORY_BYTES_MAX: u64 = 256 << 20;

/// Options for reading an input.
#[derive(Clone, Copy, Debug)]
pub(super) struct InputOptions {
    /// True if recognised compression is undone.
    pub(super) decompress: bool,
    /// True if binary data is accepted.
    pub(super) binary: bool,
}

/// Returns the error of an input that is not counted at all, which [`is_unsupported`] recognises.
pub(super) fn unsupported(why: String) -> io::Error {
    io::Error::other(UsageError(why))
}

/// Returns whether the error is a usage error from [`unsupported`].
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<UsageError>())
}

/// A compression that is undone while the input is read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Compression {
    Gzip,
    Zstd,
    Bzip2,
    Xz,
}

/// The first bytes of compressed data. Bzip2 has two signatures, for a stream with and without
/// blocks; skippable frames of zstd have sixteen, of which pzstd writes the first.
const COMPRESSED: &[(&[u8], Compression)] = &[
    (b"\x1f\x8b\x08", Compression::Gzip),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
    (b"\x50\x2a\x4d\x18", Compression::Zstd),
    (b"BZh?1AY&SY", Compression::Bzip2),
    (b"BZh?\x17\x72\x45\x38\x50\x90", Compression::Bzip2),
    (b"\xfd7zXZ\0", Compression::Xz),
];

/// The first bytes of formats that are not supported, their names, and a command that writes the
/// text to a pipe.
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

/// Byte order marks of encodings that are not supported. The longer marks come first: they begin
/// with the shorter ones.
const ENCODED: &[(&[u8], &str)] = &[
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
];

/// The byte order mark of UTF-8, which is skipped.
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

    /// Returns a decoder of all members, streams or frames, one after the other.
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

/// Decompressed text. An error names the compression.
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
                "cannot decompress {} data: {error} (is it truncated or damaged?)",
                self.compression
            );
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }
}

/// Returns whether the bytes begin with `magic`, in which `?` stands for a digit.
fn begins_with(bytes: &[u8], magic: &[u8]) -> bool {
    bytes.len() >= magic.len() && may_begin_with(bytes, magic)
}

/// Returns whether the bytes, or more of them, could begin with `magic`.
fn may_begin_with(bytes: &[u8], magic: &[u8]) -> bool {
    bytes.iter().zip(magic).all(|(byte, want)| match want {
        b'?' => byte.is_ascii_digit(),
        _ => byte == want,
    })
}

/// Returns whether there are too few bytes to detect the kind.
fn is_undecided(first: &[u8]) -> bool {
    let compressed = COMPRESSED.iter().map(|(magic, _)| *magic);
    let packed = PACKED.iter().map(|(magic, ..)| *magic);
    let marked = ENCODED.iter().map(|(mark, _)| *mark).chain([UTF_8_MARK]);
    let mut all = compressed.chain(packed).chain(marked);
    all.any(|magic| first.len() < magic.len() && may_begin_with(first, magic))
}

/// Reads the first bytes of an input: one read, and more only while the kind is not decided. An
/// error is returned after these bytes.
fn first_block(input: &mut impl Read) -> (Vec<u8>, DeferredError) {
    let mut block = vec![0; BLOCK_BYTES];
    let (mut filled, mut failed) = (0, DeferredError(None));
    while is_undecided(&block[..filled]) {
        match input.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                failed = DeferredError(Some(error));
                break;
            }
        }
    }
    block.truncate(filled);
    (block, failed)
}

/// A reader that returns an error once, if there is one, and is then empty.
struct DeferredError(Option<io::Error>);

impl Read for DeferredError {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        self.0.take().map_or(Ok(0), Err)
    }
}

impl BufRead for DeferredError {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.take().map_or(Ok(&[]), Err)
    }

    fn consume(&mut self, _: usize) {}
}

/// An input whose kind is known.
pub(super) enum OpenedInput<'a> {
    /// Text that was not compressed.
    Plain(Box<dyn BufRead + Send + 'a>),
    /// Text that is decompressed while it is read.
    Decompressed(Box<dyn BufRead + Send + 'a>),
}

/// Detects the kind of an input and returns its text from the first byte on.
pub(super) fn open<'a>(
    mut input: impl BufRead + Send + 'a,
    options: InputOptions,
) -> io::Result<OpenedInput<'a>> {
    let (first, failed) = first_block(&mut input);
    let Some(compression) = Compression::of(&first) else {
        return Ok(OpenedInput::Plain(joined(text_of(first, options)?, failed, input)));
    };
    if !options.decompress {
        let first = compressed_as_it_is(first, compression, options)?;
        return Ok(OpenedInput::Plain(joined(first, failed, input)));
    }
    let decoder = compression.decoder(joined(first, failed, input))?;
    let mut text = Decompressed { compression, decoder };
    let (first, failed) = first_block(&mut text);
    if let Some(inner) = Compression::of(&first) {
        let why = format!("is compressed twice ({inner} within {compression}): decompress it once");
        return Err(unsupported(why));
    }
    let rest = BufReader::with_capacity(BLOCK_BYTES, text);
    Ok(OpenedInput::Decompressed(joined(text_of(first, options)?, failed, rest)))
}

fn joined<'a>(
    first: Vec<u8>,
    failed: DeferredError,
    rest: impl BufRead + Send + 'a,
) -> Box<dyn BufRead + Send + 'a> {
    Box::new(Cursor::new(first).chain(failed).chain(rest))
}

fn compressed_as_it_is(
    first: Vec<u8>,
    compression: Compression,
    options: InputOptions,
) -> io::Result<Vec<u8>> {
    if options.binary {
        return Ok(first);
    }
    Err(unsupported(format!("is {compression} data: --no-decompress requires --binary for it")))
}

/// Checks the first lines of a followed file, and returns them without a byte order mark.
pub(super) fn followed(first: Vec<u8>, options: InputOptions) -> io::Result<Vec<u8>> {
    match Compression::of(&first).filter(|_| !options.binary) {
        Some(compression) => {
            Err(unsupported(format!("is {compression} data, which cannot be followed")))
        }
        None => text_of(first, options),
    }
}

/// Checks the first bytes of a text, and returns them without a byte order mark.
fn text_of(mut first: Vec<u8>, options: InputOptions) -> io::Result<Vec<u8>> {
    if options.binary {
        return Ok(first);
    }
    if let Some((_, what, unpack)) = PACKED.iter().find(|(magic, ..)| begins_with(&first, magic)) {
        let why = format!("is {what}, which is not supported: {unpack} FILE | dkc count NS -");
        return Err(unsupported(why));
    }
    if let Some((_, name)) = ENCODED.iter().find(|(mark, _)| begins_with(&first, mark)) {
        return Err(unsupported(format!(
            "is {name} according to its byte order mark: iconv -f {name} -t UTF-8 FILE | dkc \
             count NS -"
        )));
    }
    if first.contains(&0) {
        return Err(unsupported(
            "is binary (it contains NUL bytes): use --binary to count its lines; if it is UTF-16 \
             without a mark: iconv -f UTF-16LE -t UTF-8 FILE | dkc count NS -"
                .to_owned(),
        ));
    }
    if begins_with(&first, UTF_8_MARK) {
        note!("skipped a UTF-8 byte order mark at the beginning of the input");
        first.drain(..UTF_8_MARK.len());
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const USUAL: InputOptions = InputOptions { decompress: true, binary: false };
    const AS_IT_IS: InputOptions = InputOptions { decompress: false, binary: true };

    /// Returns one byte per read, as a slow pipe may.
    struct Drops<'a>(&'a [u8]);

    impl Read for Drops<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            let length = bytes.len().min(1);
            self.0.read(&mut bytes[..length])
        }
    }

    /// Returns the text, and the error after it.
    fn read(input: &[u8], options: InputOptions) -> (Vec<u8>, Option<io::Error>) {
        let mut text = Vec::new();
        let opened = open(BufReader::with_capacity(16, Drops(input)), options);
        let error = match opened {
            Ok(OpenedInput::Plain(mut input) | OpenedInput::Decompressed(mut input)) => {
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
    fn check_refused(input: &[u8], options: InputOptions, want: &str) {
        let error = open(input, options).err().expect("an error");
        assert!(is_unsupported(&error), "{error}");
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
        // Beginnings that could also be those of another format.
        for text in
            [&b"B"[..], b"BZh9 is a word\n", b"\x1f", b"PK\n", b"LZIP\n", b"\xef\xbb", b"\xff"]
        {
            check(text, text);
        }
    }

    #[test]
    fn compressed_text_is_decompressed() {
        for compression in ALL {
            for text in [&b""[..], b"a\nb\n", &b"line\n".repeat(100_000)] {
                check(&compress(compression, text), text);
            }
            // Several members, as logrotate and pzstd write them.
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
    fn damaged_and_truncated_data_is_reported() {
        let text: Vec<u8> =
            (0..50_000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
        for compression in ALL {
            let packed = compress(compression, &text);
            let truncated = &packed[..packed.len() - 5];
            let mut damaged = packed.clone();
            let middle = packed.len() / 2;
            damaged[middle..middle + 40].fill(0x55);
            for input in [truncated, &damaged] {
                let (got, error) = read(input, USUAL);
                let error = error.expect("an error").to_string();
                assert!(
                    error.contains(&format!("cannot decompress {compression} data")),
                    "{error}"
                );
                assert!(got.len() <= text.len());
            }
            let behind = [&packed[..], b"\x01\x02\x03 no member of it"].concat();
            if compression != Compression::Bzip2 {
                assert!(read(&behind, USUAL).1.is_some(), "{compression}");
            }
        }
    }

    #[test]
    fn binary_data_is_rejected() {
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
            let kept = InputOptions { decompress: false, binary: false };
            check_refused(&packed, kept, "--no-decompress requires --binary");
            assert_eq!(read(&packed, AS_IT_IS).0, packed);
            check_refused(&compress(compression, b"a\0\n"), USUAL, "--binary");
        }
        assert_eq!(read(b"a\0b\n", AS_IT_IS).0, b"a\0b\n");
        let unpacked = InputOptions { decompress: true, binary: true };
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
