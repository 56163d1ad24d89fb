//! The arguments that the client commands share: gateways, namespaces and keys.

use std::time::Duration;

use client::Url;
use engine::key::{KEY_BYTES_MAX, NameMaker};
use gateway::request::percent_decode;

use crate::output::note;

/// A command that has waited this long for an answer prints what it waits for.
pub(crate) const NOTICE_AFTER: Duration = Duration::from_secs(1);

/// Options of the client commands: the gateways and the output format.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServerArgs {
    /// URLs of the cluster's gateways
    #[arg(
        long = "url",
        env = "DKC_URL",
        value_name = "URL[,URL…]",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8080",
        value_parser = Url::parse
    )]
    pub(crate) urls: Vec<Url>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Waits for `work`. If that takes long, a line on stderr names the gateways that have not
/// answered.
pub(crate) async fn with_notice<T>(urls: &[Url], until: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if let Ok(done) = tokio::time::timeout(NOTICE_AFTER, &mut work).await {
        return done;
    }
    note!("no answer yet from {}: waiting {until}", names(urls));
    work.await
}

/// The gateways' URLs as the user gave them.
pub(crate) fn names(urls: &[Url]) -> String {
    urls.iter().map(Url::to_string).collect::<Vec<_>>().join(", ")
}

/// Checks a namespace before any request is sent.
pub(crate) fn namespace(text: &str) -> Result<String, String> {
    match NameMaker::new(text.as_bytes(), 0) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("a namespace is 1 to 64 of a-z 0-9 _ . -".to_owned()),
    }
}

/// Parses a key from the command line: any bytes, or percent-encoded.
pub(crate) fn key(text: std::ffi::OsString, is_percent: bool) -> Result<Vec<u8>, String> {
    use std::os::unix::ffi::OsStringExt;
    let mut key = text.into_vec();
    if is_percent {
        key = percent_decode(&key).ok_or_else(|| {
            let text = String::from_utf8_lossy(&key);
            format!("{text:?} is not percent-encoded: each % must be followed by two hex digits")
        })?;
    }
    if (1..=KEY_BYTES_MAX).contains(&key.len()) {
        Ok(key)
    } else {
        Err(format!("a key is 1 to {KEY_BYTES_MAX} bytes, this one has {}", key.len()))
    }
}

/// Percent-encodes a key for one line of text: `%` itself, control characters and bytes that are
/// not UTF-8 are escaped. [`key`] decodes the result.
pub(crate) fn shown(key: &[u8]) -> String {
    let mut text = String::with_capacity(key.len());
    let escape = |text: &mut String, bytes: &[u8]| {
        bytes.iter().for_each(|byte| text.push_str(&format!("%{byte:02X}")));
    };
    for chunk in key.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter == '%' || letter.is_control() {
                escape(&mut text, letter.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                text.push(letter);
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_shown_key_can_be_given_back() {
        #[track_caller]
        fn check(bytes: &[u8], want: &str) {
            assert_eq!(shown(bytes), want);
            assert_eq!(key(want.into(), true).as_deref(), Ok(bytes), "{want}");
            let raw = std::ffi::OsString::from_vec(bytes.to_vec());
            assert_eq!(key(raw, false).as_deref(), Ok(bytes));
        }
        check(b"plain", "plain");
        check("käse 🧀".as_bytes(), "käse 🧀");
        check(b"100%", "100%25");
        check(b"/a%20b", "/a%2520b");
        check(b"caf\xe9", "caf%E9");
        check(b"a\tb\nc\x1b[31m", "a%09b%0Ac%1B[31m");
        check(b"\xff\xfe\x00", "%FF%FE%00");
        check("\u{85}".as_bytes(), "%C2%85");
        check(b"\xe2\x82", "%E2%82");
    }

    #[test]
    fn invalid_percent_encoding_is_refused() {
        for text in ["%", "a%4", "%zz", "100%", "%-1", "%+1"] {
            assert!(key(text.into(), true).unwrap_err().contains("percent-encoded"), "{text}");
        }
        assert_eq!(key("%e9".into(), true), Ok(b"\xe9".to_vec()));
        assert!(key("".into(), true).is_err());
    }
}
