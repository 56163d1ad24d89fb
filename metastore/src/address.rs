//! Parses the addresses that flags take: addresses to dial and addresses to listen on.
//!
//! A port is always required, so the text after the last colon is the port. An IPv6 address
//! therefore needs no brackets: `fd00::5:7001`, which is what `$(POD_IP):7001` becomes, is read as
//! `[fd00::5]:7001`. A process that others can't dial looks healthy and is of no use, so an address
//! that can't be dialled is refused here, with an error that states what is expected.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Parses the address at which others dial a process: `host:port`.
///
/// Returns it with brackets around an IPv6 address; the error is a text for the user.
pub fn advertised(text: &str) -> Result<String, String> {
    Ok(dialled(text)?.to_string())
}

/// Parses the address of an etcd member: `host:port`, with or without `http://` before it.
pub fn endpoint(text: &str) -> Result<String, String> {
    if text.starts_with("https://") {
        return Err(
            "dkc can't use TLS with etcd yet: host:port or http://host:port of an etcd without \
             TLS is expected"
                .to_owned(),
        );
    }
    let (scheme, address) = match text.strip_prefix("http://") {
        Some(address) => ("http://", address),
        None => ("", text),
    };
    let address = dialled(address)
        .map_err(|why| format!("host:port or http://host:port is expected: {why}"))?;
    Ok(format!("{scheme}{address}"))
}

/// Parses the address that a process listens on: an IP address and a port.
pub fn listened(text: &str) -> Result<SocketAddr, String> {
    let Address { host, port } = split(text)?;
    match host {
        Host::Ip(ip) => Ok(SocketAddr::new(ip, port)),
        Host::Name(name) => Err(format!(
            "{name:?} is a name: the IP address of an interface is expected, or 0.0.0.0 or [::] \
             for all of them"
        )),
    }
}

/// Returns a warning if `address` is a loopback address while an etcd member has another address.
///
/// Other machines can't dial a loopback address, and an etcd elsewhere means that there are other
/// machines.
pub fn loopback_beside(address: &str, endpoints: &[String]) -> Option<String> {
    let is_loopback = |text: &str| {
        split(text.trim_start_matches("http://")).is_ok_and(|address| address.host.is_loopback())
    };
    let elsewhere = endpoints.iter().find(|endpoint| !is_loopback(endpoint))?;
    is_loopback(address).then(|| {
        format!(
            "only processes of this machine can dial {address}, and etcd is elsewhere \
             ({elsewhere}): set --advertise to an address that others can dial"
        )
    })
}

/// A host and a port, each valid by itself.
struct Address<'a> {
    host: Host<'a>,
    port: u16,
}

enum Host<'a> {
    Ip(IpAddr),
    Name(&'a str),
}

impl Host<'_> {
    fn is_loopback(&self) -> bool {
        match self {
            Self::Ip(ip) => ip.to_canonical().is_loopback(),
            Self::Name(name) => name.trim_end_matches('.').eq_ignore_ascii_case("localhost"),
        }
    }
}

impl std::fmt::Display for Address<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host {
            Host::Ip(ip) => write!(f, "{}", SocketAddr::new(ip, self.port)),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// Parses an address and refuses one that can't be dialled.
fn dialled(text: &str) -> Result<Address<'_>, String> {
    let address = split(text)?;
    if address.port == 0 {
        return Err("port 0 can't be dialled".to_owned());
    }
    if let Host::Ip(ip) = address.host {
        let plain = ip.to_canonical();
        let is_broadcast = plain == IpAddr::from([255; 4]);
        if plain.is_unspecified() || plain.is_multicast() || is_broadcast {
            return Err(format!(
                "{ip} is no address that can be dialled: the address of one machine is expected"
            ));
        }
    }
    Ok(address)
}

fn split(text: &str) -> Result<Address<'_>, String> {
    const EXPECTED: &str = "host:port is expected";
    if text.is_empty() {
        return Err(format!("it is empty: {EXPECTED}"));
    }
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(format!("it has blanks: {EXPECTED}"));
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(format!("{EXPECTED}, without {scheme}://"));
    }
    let without_port = || format!("there is no port: {EXPECTED}");
    let is_all_host = text.parse::<Ipv6Addr>().is_ok() && !has_bare_host(text);
    if is_all_host || text.ends_with(']') {
        return Err(without_port());
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(without_port)?;
    Ok(Address { host: host_of(host)?, port: port_of(port)? })
}

/// Returns whether the text before the last colon is an IPv6 address by itself.
fn has_bare_host(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, _)| host.parse::<Ipv6Addr>().is_ok())
}

fn port_of(text: &str) -> Result<u16, String> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|_| is_number);
    port.ok_or_else(|| {
        format!("{text:?} is no port: a number up to 65535 is expected after the last colon")
    })
}

fn host_of(text: &str) -> Result<Host<'_>, String> {
    let inside = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let wrong = |what: &str| Err(format!("{text:?} is no {what}"));
    if let Some(inside) = inside {
        return match inside.parse() {
            Ok(ip) => Ok(Host::Ip(IpAddr::V6(ip))),
            Err(_) => wrong("IPv6 address in brackets"),
        };
    }
    if let Ok(ip) = text.parse() {
        return Ok(Host::Ip(ip));
    }
    if text.contains([':', '[', ']']) {
        return wrong("IPv6 address");
    }
    // A name that ends in a number is a mistyped address, such as 10.0.0 or 10.0.0.256.
    let is_name = |name: &str| {
        let last = name.rsplit('.').next().unwrap_or(name);
        name.len() <= 253
            && name.split('.').all(is_label)
            && !last.bytes().all(|b| b.is_ascii_digit())
    };
    match is_name(text.strip_suffix('.').unwrap_or(text)) {
        true => Ok(Host::Name(text)),
        false => wrong("host's name and no IP address"),
    }
}

/// Returns whether `label` is valid as a part of a host name. Underscores are not in the standard,
/// but in the names of many containers.
fn is_label(label: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    (1..=63).contains(&label.len()) && label.bytes().all(fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &str, want: Result<&str, &str>) {
        match (advertised(given), want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want),
            (Err(why), Err(want)) => assert!(why.contains(want), "{given:?}: {why}"),
            (got, want) => panic!("{given:?}: {got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn an_address_to_dial_has_a_host_and_a_port() {
        for fine in [
            "10.0.0.1:7001",
            "node-1:7001",
            "node_1.dkc.svc.:65535",
            "[fd00::5]:7001",
            "[::1]:1",
            "3com.example:1",
        ] {
            check(fine, Ok(fine));
        }
        // As `$(POD_IP):7001` makes them, without brackets.
        check("fd00::5:7001", Ok("[fd00::5]:7001"));
        check("2001:db8:1:2:3:4:5:6:7001", Ok("[2001:db8:1:2:3:4:5:6]:7001"));
        check("FD00:0::5:7001", Ok("[fd00::5]:7001"));
        check("::1:7001", Ok("[::1]:7001"));
        check("::ffff:10.0.0.1:7001", Ok("[::ffff:10.0.0.1]:7001"));
    }

    #[test]
    fn an_address_that_can_not_be_dialled_is_refused_with_a_reason() {
        for (given, want) in [
            ("", "empty"),
            (":7001", "no host's name"),
            ("node-1", "no port"),
            ("node-1:", "\"\" is no port"),
            ("node-1:http", "\"http\" is no port"),
            ("node-1:+7001", "no port"),
            ("node-1:-1", "no port"),
            ("node-1:65536", "\"65536\" is no port"),
            ("127.0.0.1:99999", "no port"),
            ("127.0.0.1:0", "port 0"),
            ("0.0.0.0:7001", "0.0.0.0"),
            ("[::]:7001", "::"),
            ("::7001", "no port"),
            (":::7001", ":: is no address"),
            ("[::ffff:0.0.0.0]:7001", "no address that can be dialled"),
            ("255.255.255.255:7001", "255.255.255.255"),
            ("224.0.0.1:7001", "224.0.0.1"),
            ("[ff02::1]:7001", "ff02::1"),
            ("http://127.0.0.1:7001", "without http://"),
            ("tcp://127.0.0.1:7001", "without tcp://"),
            (" 127.0.0.1:7001", "blanks"),
            ("127.0.0.1:7001 ", "blanks"),
            ("a b:7001", "blanks"),
            ("a\tb:7001", "blanks"),
            ("127.0.0.1:7001/", "no port"),
            ("127.0.0.1:7001/x", "no port"),
            ("user@host:7001", "no host's name"),
            ("a,b:7001", "no host's name"),
            ("10.0.0.1:7001,10.0.0.2:7001", "no IPv6 address"),
            ("10.0.0:7001", "no host's name"),
            ("10.0.0.256:7001", "no host's name"),
            ("1234:7001", "no host's name"),
            ("nöde:7001", "no host's name"),
            ("a..b:7001", "no host's name"),
            ("fd00::5", "no port"),
            ("[fd00::5]", "no port"),
            ("[fd00::5:7001", "no IPv6 address"),
            ("fd00::5]:7001", "no IPv6 address"),
            ("[10.0.0.1]:7001", "in brackets"),
            ("[node-1]:7001", "in brackets"),
            ("fe80::1%eth0:7001", "no IPv6 address"),
            ("[fe80::1%eth0]:7001", "in brackets"),
            ("fd00::5::7001", "no IPv6 address"),
            ("$(POD_IP):7001", "no host's name"),
        ] {
            check(given, Err(want));
        }
        check(&format!("{}:1", "a".repeat(64)), Err("no host's name"));
        check(&format!("{}a:1", "a.".repeat(127)), Err("no host's name"));
    }

    #[test]
    fn an_etcd_endpoint_may_have_a_scheme_but_not_tls() {
        for fine in ["127.0.0.1:2379", "http://etcd-1.example:2379", "[::1]:2379"] {
            assert_eq!(endpoint(fine).as_deref(), Ok(fine));
        }
        assert_eq!(endpoint("http://fd00::5:2379").as_deref(), Ok("http://[fd00::5]:2379"));
        for wrong in [
            "",
            "etcd",
            ":2379",
            "etcd:",
            "etcd:65536",
            "a b:1",
            "a/b:1",
            "etcd:0",
            "http://etcd:1/",
            "0.0.0.0:1",
        ] {
            let why = endpoint(wrong).expect_err(wrong);
            assert!(why.contains("host:port or http://host:port is expected"), "{wrong}: {why}");
        }
        assert!(endpoint("https://etcd:1").is_err_and(|why| why.contains("can't use TLS")));
    }

    #[test]
    fn an_address_to_listen_on_is_an_ip_address() {
        for (given, want) in [
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("0.0.0.0:7001", "0.0.0.0:7001"),
            ("[::]:7001", "[::]:7001"),
            ("fd00::5:7001", "[fd00::5]:7001"),
        ] {
            assert_eq!(listened(given).map(|at| at.to_string()).as_deref(), Ok(want));
        }
        for wrong in [
            "localhost:7001",
            ":7001",
            "7001",
            "127.0.0.1",
            "127.0.0.1:65536",
            " 127.0.0.1:1",
            "http://127.0.0.1:1",
        ] {
            assert!(listened(wrong).is_err(), "{wrong}");
        }
        assert!(listened("localhost:7001").is_err_and(|why| why.contains("is a name")));
    }

    #[test]
    fn a_loopback_address_beside_an_etcd_elsewhere_is_odd() {
        #[track_caller]
        fn check(address: &str, etcd: &[&str], odd: bool) {
            let etcd: Vec<_> = etcd.iter().map(|&endpoint| endpoint.to_owned()).collect();
            assert_eq!(loopback_beside(address, &etcd).is_some(), odd, "{address} {etcd:?}");
        }
        check("127.0.0.1:7001", &["10.0.0.1:2379"], true);
        check("[::1]:7001", &["http://etcd:2379"], true);
        check("localhost:7001", &["etcd:2379"], true);
        check("127.0.0.1:7001", &["127.0.0.1:2379", "http://localhost:2380", "[::1]:2379"], false);
        check("127.0.0.1:7001", &["127.0.0.1:2379", "10.0.0.1:2379"], true);
        check("10.0.0.1:7001", &["10.0.0.2:2379"], false);
    }
}
