//! Detects the features of this machine that chaos needs: network and mount namespaces, packet
//! filters, slow links, small disks.
//!
//! The program runs itself again under `unshare`, in a network and a mount namespace of its own.
//! The bridge, links and mounts that it makes there disappear when it ends, however it ends. No
//! address of the cluster exists outside, so no packet can leave this machine. Where namespaces are
//! not permitted the program prints that, and continues with processes on loopback and folders on
//! the disk of the machine.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// The environment variable that is set for the program inside the namespaces.
const INSIDE: &str = "DKC_CHAOS_INSIDE";

/// The features that can be used. [`enter`] prints the missing ones once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sandbox {
    /// Each process has a network namespace, joined by a bridge.
    pub namespaces: bool,
    /// `nft` can drop packets in them.
    pub filters: bool,
    /// `tc netem` can delay and lose packets.
    pub netem: bool,
    /// `tc tbf` can limit the bandwidth of a link.
    pub slow_links: bool,
    /// Each node can have a file system of its own.
    pub small_disks: bool,
}

/// Runs this program again inside namespaces of its own, if permitted, and detects the features
/// there.
pub fn enter() -> Sandbox {
    const UNSHARE: &[&str] = &["--net", "--mount", "--propagation", "private", "--"];
    if std::env::var_os(INSIDE).is_none() {
        if run("unshare", &[UNSHARE, &["true"]].concat()).is_ok()
            && let Ok(program) = std::env::current_exe()
        {
            let mut again = Command::new("unshare");
            again.args(UNSHARE).arg(program).args(std::env::args_os().skip(1)).env(INSIDE, "yes");
            let failed = again.exec();
            crate::note(&format!("unshare: {failed}"));
        }
        crate::note("no namespaces are permitted here (that takes root)");
        return without();
    }
    let sandbox = look();
    let missing = [
        (sandbox.namespaces, "network namespaces (ip netns)"),
        (sandbox.filters, "packet filters (nft): no cut or lossy networks"),
        (
            sandbox.netem,
            "tc netem: a link of 1 Mbit/s replaces delay, random drops by nft replace loss",
        ),
        (sandbox.slow_links || sandbox.netem, "tc tbf: no slow networks"),
        (sandbox.small_disks, "mounts of tmpfs: no full disks"),
    ];
    for (_, what) in missing.iter().filter(|(there, _)| !there) {
        crate::note(&format!("not available here: {what}"));
    }
    sandbox
}

/// Returns the features without namespaces.
pub fn without() -> Sandbox {
    crate::note("processes on loopback only, without cut, slow or lossy networks and full disks");
    Sandbox::default()
}

/// Tries every feature once. It runs inside the namespaces, so that nothing remains.
fn look() -> Sandbox {
    const TRIAL: &str = "trial";
    let mut sandbox = Sandbox::default();
    // `ip netns` stores names there; those of this program must not be visible outside or outlive
    // it.
    let named = std::fs::create_dir_all("/run/netns").is_ok()
        && run("mount", &["-t", "tmpfs", "dkc-chaos", "/run/netns"]).is_ok();
    sandbox.small_disks = named;
    sandbox.namespaces = named
        && run("ip", &["link", "set", "lo", "up"]).is_ok()
        && run("ip", &["netns", "add", TRIAL]).is_ok()
        && run("ip", &["-n", TRIAL, "link", "set", "lo", "up"]).is_ok();
    if sandbox.namespaces {
        let tc = |shape: &[&str]| {
            let done =
                run("tc", &[&["-n", TRIAL, "qdisc", "add", "dev", "lo", "root"], shape].concat());
            let _was_none = run("tc", &["-n", TRIAL, "qdisc", "del", "dev", "lo", "root"]);
            done.is_ok()
        };
        sandbox.netem = tc(&["netem", "delay", "1ms"]);
        sandbox.slow_links = tc(&["tbf", "rate", "1mbit", "burst", "4kb", "latency", "500ms"]);
        sandbox.filters = filter(TRIAL, &[]).is_ok();
        let _stays_unused = run("ip", &["netns", "del", TRIAL]);
    }
    sandbox
}

/// Runs a program to its end. The error contains its stderr.
pub fn run(program: &str, args: &[&str]) -> Result<(), String> {
    feed(program, args, "")
}

/// Runs a program to its end with this input on stdin. The error contains its stderr.
pub fn feed(program: &str, args: &[&str], input: &str) -> Result<(), String> {
    let what = || format!("{program} {}", args.join(" "));
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("{}: {error}", what()))?;
    // A broken pipe is ignored: a program that ends without reading fails by its exit code.
    let _broken_pipe = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(|error| format!("{}: {error}", what()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim()))
}

/// Writes all rules for incoming packets of a namespace in one transaction.
pub fn filter(namespace: &str, rules: &[String]) -> Result<(), String> {
    let mut text = "table ip chaos {}\ndelete table ip chaos\ntable ip chaos {\nchain in {\n\
                    type filter hook input priority 0;\n"
        .to_owned();
    for rule in rules {
        text.push_str(rule);
        text.push('\n');
    }
    text.push_str("}\n}\n");
    feed("ip", &["netns", "exec", namespace, "nft", "-f", "-"], &text)
}
