//! `chaos [--minutes M] [--seed N] [--faults a,b,c] [--dkc PATH]`: real processes under real
//! faults.
//!
//! With `--no-namespaces` the processes run on loopback, as where namespaces are not permitted.
//! With `--keep` history and logs are kept even if every promise held.
//!
//! Exit code 0: every promise held; 1: a promise was broken, and history, logs and data are kept;
//! 2: usage, or the cluster did not start.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tests::chaos::{ChaosSettings, run, sandbox};

const USAGE: &str = "chaos [--minutes M] [--seed N] [--faults a,b,c] [--dkc PATH] \
                     [--no-namespaces] [--keep]  (etcd: $ETCD, or otherwise from PATH)";

fn main() -> ExitCode {
    let Some(settings) = parse(std::env::args().skip(1)) else {
        tests::note(USAGE);
        return ExitCode::from(2);
    };
    // If namespaces are permitted, `enter` replaces this process by the same program inside them.
    let sandbox = if settings.namespaces { sandbox::enter() } else { sandbox::without() };
    tests::note(&format!(
        "seed {}, {:.1} min",
        settings.seed,
        settings.length.as_secs_f32() / 60.0
    ));
    match run(&settings, sandbox) {
        Ok((table, held)) => {
            print_line(&table);
            print_line(if held { "every promise held" } else { "BROKEN: see above" });
            if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(why) => {
            tests::note(&why);
            ExitCode::from(2)
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<ChaosSettings> {
    let mut minutes = 2.0_f32;
    let mut seed = 1;
    let mut faults = Vec::new();
    let mut dkc = None;
    let mut namespaces = true;
    let mut keep = false;
    while let Some(word) = words.next() {
        match word.as_str() {
            "--minutes" => minutes = words.next()?.parse().ok().filter(|&minutes| minutes > 0.0)?,
            "--seed" => seed = words.next()?.parse().ok()?,
            "--faults" => faults = words.next()?.split(',').map(str::to_owned).collect(),
            "--dkc" => dkc = Some(PathBuf::from(words.next()?)),
            "--no-namespaces" => namespaces = false,
            "--keep" => keep = true,
            _ => return None,
        }
    }
    let etcd = std::env::var_os("ETCD").filter(|path| !path.is_empty());
    Some(ChaosSettings {
        length: Duration::try_from_secs_f32(minutes * 60.0).ok()?,
        seed,
        faults,
        namespaces,
        keep,
        dkc: dkc.unwrap_or_else(tests::cluster::dkc_binary),
        etcd: etcd.map_or_else(|| "etcd".into(), PathBuf::from),
    })
}

fn print_line(text: &str) {
    let _closed_pipe = writeln!(std::io::stdout().lock(), "{text}");
}
