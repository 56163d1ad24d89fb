//! The settings of a role, from flags, `DKC_*` variables, a file and defaults, in this order of
//! precedence.
//!
//! The file is TOML without sections, and its keys are the long flags (`lease-ttl = 2`,
//! kebab-case). Its values become the *defaults* of clap's arguments before the command line is
//! parsed. So clap applies one precedence and one check to every value, and records the origin of
//! each. No role has a parser of its own, and every new flag is a new key of the file.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// A role's own options, and the options that all roles have.
#[derive(Debug, clap::Args)]
pub(crate) struct RoleArgs<O: clap::Args> {
    /// The role's own options.
    #[command(flatten)]
    pub(crate) options: O,
    /// The options of the log.
    #[command(flatten)]
    pub(crate) log: telemetry::LogOptions,
    /// TOML file with settings, whose keys are the names of these flags; flags and environment
    /// variables take precedence
    #[arg(long, env = "DKC_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the settings without starting, print them with their origins, and exit: with 2 if the
    /// role would not start
    #[arg(long)]
    pub(crate) check_config: bool,
}

/// A parsed command line, and the origins of its settings.
pub(crate) struct ParsedConfig {
    /// The arguments of the whole command line.
    pub(crate) matches: ArgMatches,
    command: Command,
    file: Option<ConfigFile>,
}

/// The keys that a configuration file sets.
struct ConfigFile {
    path: PathBuf,
    keys: BTreeSet<String>,
}

/// The reason why a command line cannot be parsed.
pub(crate) enum ConfigError {
    /// Wrong usage, or `--help`.
    Usage(clap::Error),
    /// The configuration file cannot be used.
    File(String),
}

impl From<clap::Error> for ConfigError {
    fn from(error: clap::Error) -> Self {
        Self::Usage(error)
    }
}

/// Parses a command line, with the configuration file that it names.
pub(crate) fn parse(command: Command, line: &[OsString]) -> Result<ParsedConfig, ConfigError> {
    // The first, lenient pass only finds the file, which may contain required settings.
    let lenient = command.clone().ignore_errors(true).try_get_matches_from(line);
    let found = lenient.ok().and_then(|mut matches| {
        let (name, role) = matches.remove_subcommand()?;
        let file = role.try_get_one::<PathBuf>("config").ok().flatten()?.clone();
        Some((name, file))
    });
    let (command, file) = match found {
        None => (command, None),
        Some((name, path)) => {
            let role = command.find_subcommand(&name).expect("it was just found").clone();
            let (role, keys) = with_file(role, &path)
                .map_err(|why| ConfigError::File(format!("{}: {why}", path.display())))?;
            (command.mut_subcommand(&name, |_| role), Some(ConfigFile { path, keys }))
        }
    };
    let matches = command.clone().try_get_matches_from(line)?;
    Ok(ParsedConfig { matches, command, file })
}

/// Returns the settings of a role: every flag that takes a value, except the one that names the
/// file.
fn settings(role: &Command) -> impl Iterator<Item = &Arg> {
    let is_setting = |arg: &&Arg| arg.get_action().takes_values() && arg.get_id() != "config";
    role.get_arguments().filter(is_setting)
}

/// Returns the role's command with the values of the file as defaults, and the keys of the file.
fn with_file(mut role: Command, file: &Path) -> Result<(Command, BTreeSet<String>), String> {
    let text = std::fs::read_to_string(file).map_err(|error| error.to_string())?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| error.to_string())?;
    for (key, value) in &table {
        let known = settings(&role).find(|arg| arg.get_long() == Some(key));
        let Some(arg) = known.cloned() else { return Err(unknown(&role, key)) };
        let words = words(&arg, value).ok_or_else(|| {
            let list = if is_list(&arg) { " or a list of them" } else { "" };
            format!("{key} = {value}: expected a string or a number{list}")
        })?;
        check(&arg, key, &words)?;
        role = role.mut_arg(arg.get_id(), |arg| arg.required(false).default_values(words));
    }
    Ok((role, table.into_iter().map(|(key, _)| key).collect()))
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

fn words(arg: &Arg, value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Array(list) if is_list(arg) && !list.is_empty() => {
            let text = |item: &toml::Value| item.as_str().map(str::to_owned);
            list.iter().map(text).collect()
        }
        _ => None,
    }
}

/// Checks that the flag accepts the value. The check is done here so that the error names the file.
fn check(arg: &Arg, key: &str, words: &[String]) -> Result<(), String> {
    let alone = Command::new("file").no_binary_name(true).arg(arg.clone().required(false));
    let given = words.iter().map(|word| format!("--{key}={word}"));
    match alone.try_get_matches_from(given) {
        Ok(_) => Ok(()),
        Err(error) => {
            // The rest of clap's text is about a command line.
            let text = error.to_string();
            let lines: Vec<_> =
                text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            Err(lines.join(" ").trim_start_matches("error: ").to_owned())
        }
    }
}

fn unknown(role: &Command, key: &str) -> String {
    let names = || settings(role).filter_map(Arg::get_long);
    match nearest(names(), key) {
        Some(nearest) => format!("unknown key {key:?}: did you mean {nearest:?}?"),
        None => {
            format!(
                "unknown key {key:?}: known keys are {}",
                names().collect::<Vec<_>>().join(", ")
            )
        }
    }
}

/// Returns the known name that is most similar to `given`, unless all differ too much.
fn nearest<'a>(names: impl Iterator<Item = &'a str>, given: &str) -> Option<&'a str> {
    let distance = |name: &&str| strsim::damerau_levenshtein(name, given);
    names.min_by_key(distance).filter(|name| distance(name) <= name.len() / 2)
}

/// Variables of this repository's scripts and tests, which processes started by them inherit.
const OF_SCRIPTS: [&str; 2] = ["DKC_BIN", "DKC_CACHE"];

/// Returns a warning for each `DKC_*` variable that no command reads.
///
/// Kubernetes sets variables for each service in a pod, such as `DKC_GATEWAY_SERVICE_HOST`: these
/// are not reported.
fn unknown_variables(command: &Command, set: &BTreeSet<String>) -> Vec<String> {
    let of_command = |command: &Command| -> Vec<String> {
        let named = command.get_arguments().filter_map(Arg::get_env);
        named.map(|name| name.to_string_lossy().into_owned()).collect()
    };
    let known: BTreeSet<String> = command.get_subcommands().flat_map(of_command).collect();
    let services: Vec<_> =
        set.iter().filter_map(|name| name.strip_suffix("SERVICE_HOST")).collect();
    let is_unknown = |name: &&String| {
        name.starts_with("DKC_")
            && !known.contains(*name)
            && !OF_SCRIPTS.contains(&name.as_str())
            && !services.iter().any(|service| name.starts_with(service))
    };
    let warning = |name: &String| {
        let meant = nearest(known.iter().map(String::as_str), name);
        let meant = meant.map_or_else(String::new, |meant| format!(": did you mean {meant}?"));
        format!("unknown environment variable {name}{meant}")
    };
    set.iter().filter(is_unknown).map(warning).collect()
}

impl ParsedConfig {
    /// Returns a warning for each `DKC_*` variable of this process that no command reads.
    pub(crate) fn unknown_variables(&self) -> Vec<String> {
        let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
        unknown_variables(&self.command, &names.collect())
    }

    /// The subcommand of the role.
    pub(crate) fn role_name(&self) -> &str {
        self.matches.subcommand_name().expect("a role is a subcommand")
    }

    /// The arguments of the role.
    pub(crate) fn role(&self) -> &ArgMatches {
        self.matches.subcommand().expect("a role is a subcommand").1
    }

    /// The settings as a configuration file, each with its origin. Given as `--config`, the file
    /// has the same effect as this command line.
    pub(crate) fn print(&self) -> String {
        let (name, matches) = self.matches.subcommand().expect("a role is a subcommand");
        let role = self.command.find_subcommand(name).expect("it was parsed");
        let mut lines = Vec::new();
        for arg in settings(role) {
            let (id, key) = (arg.get_id().as_str(), arg.get_long().expect("it has a long name"));
            let Some(origin) = self.origin(matches, arg) else {
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                lines.push((format!("# {key} ="), format!("not set: {help}")));
                continue;
            };
            let words = matches.get_raw(id).expect("it has an origin");
            let mut values: Vec<_> = words.map(|word| value(&word.to_string_lossy())).collect();
            let value = match is_list(arg) {
                true => toml::Value::Array(values),
                false => values.pop().expect("a value of one word"),
            };
            lines.push((format!("{key} = {value}"), origin));
        }
        let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0);
        let mut text = format!("# dkc {name}\n");
        for (line, origin) in lines {
            writeln!(text, "{line:<width$}  # {origin}").expect("a String takes every text");
        }
        text
    }

    fn origin(&self, matches: &ArgMatches, arg: &Arg) -> Option<String> {
        let key = arg.get_long().unwrap_or_default();
        let in_file = self.file.as_ref().filter(|file| file.keys.contains(key));
        Some(match (matches.value_source(arg.get_id().as_str())?, in_file) {
            (ValueSource::CommandLine, _) => "flag".to_owned(),
            (ValueSource::EnvVariable, _) => {
                format!("env {}", arg.get_env().unwrap_or_default().to_string_lossy())
            }
            (_, Some(file)) => format!("file {}", file.path.display()),
            (_, None) => "default".to_owned(),
        })
    }
}

/// Formats a value as a TOML number if it is one: [`words`] turns numbers into words again.
fn value(word: &str) -> toml::Value {
    match word.parse::<i64>() {
        Ok(number) if number.to_string() == word => toml::Value::Integer(number),
        _ => toml::Value::String(word.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "dkc")]
    struct Line {
        #[command(subcommand)]
        role: Roles,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Roles {
        Coordinator(RoleArgs<coordinator::Options>),
        Gateway(RoleArgs<gateway::Options>),
    }

    fn parsed(file: &str, line: &str) -> Result<ParsedConfig, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("dkc.toml");
        std::fs::write(&path, file).expect("a file of ours");
        let line = line.replace("FILE", path.to_str().expect("a plain path"));
        let line: Vec<_> = line.split_whitespace().map(OsString::from).collect();
        let parsed = parse(Line::command(), &line);
        parsed.map_err(|refused| match refused {
            ConfigError::Usage(error) => error.to_string(),
            ConfigError::File(why) => why,
        })
    }

    const COORDINATOR: &str = "name = \"c\"\nlisten = \"127.0.0.1:1\"\netcd = [\"a:1\", \"b:2\"]\n";

    #[test]
    fn a_file_fills_what_the_line_leaves_open() {
        let file = format!("{COORDINATOR}shards = 12\nlease-ttl = 5\n");
        let all = parsed(&file, "dkc coordinator --config FILE --lease-ttl 7").expect("good");
        let Line { role: Roles::Coordinator(role) } =
            Line::from_arg_matches(&all.matches).expect("good")
        else {
            panic!("another role")
        };
        let options = role.options;
        assert_eq!(
            (options.name.as_str(), options.shards, options.process.lease_ttl),
            ("c", Some(12), 7)
        );
        assert_eq!(options.cluster.etcd, ["a:1", "b:2"]);
        let text = all.print();
        let origin = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(&format!("{key} = "))).expect(key);
            line.split_once("  # ").expect("an origin").1.split(' ').next().expect("a word")
        };
        assert_eq!(["lease-ttl", "shards", "cluster"].map(origin), ["flag", "file", "default"]);
        assert!(text.contains("# replicas ="), "{text}");
    }

    #[test]
    fn what_is_printed_means_the_same() {
        let file = format!("{COORDINATOR}cluster = \"42\"\n");
        let first = parsed(&file, "dkc coordinator --config FILE --replicas 5").expect("good");
        let again = parsed(&first.print(), "dkc coordinator --config FILE").expect("good");
        let plain = |parsed: &ParsedConfig| parsed.print().parse::<toml::Table>().expect("TOML");
        assert_eq!(plain(&again), plain(&first));
        assert_eq!(plain(&first)["replicas"].as_integer(), Some(5));
    }

    #[test]
    fn a_wrong_file_is_refused_by_key_value_and_what_is_allowed() {
        #[track_caller]
        fn check(file: &str, want: &[&str]) {
            let why = parsed(file, "dkc gateway --config FILE").err().expect("nonsense");
            for want in want.iter().chain(&["dkc.toml"]) {
                assert!(why.contains(want), "{file}: {why}");
            }
        }
        check("workers = 0", &["workers", "'0'", "1..=256"]);
        check("http = \"here\"", &["http", "'here'"]);
        check("workres = 2", &["unknown key \"workres\"", "did you mean \"workers\""]);
        check("lease_ttl = 2", &["did you mean \"lease-ttl\""]);
        check("zzz = 2", &["unknown key \"zzz\"", "workers"]);
        check("config = \"x\"", &["unknown key"]);
        check("check-config = \"x\"", &["unknown key"]);
        check("workers = [1]", &["workers", "expected a string or a number"]);
        check("workers = true", &["workers"]);
        check("etcd = []", &["etcd"]);
        check("etcd = [\"nowhere\"]", &["etcd", "'nowhere'", "host:port"]);
        check("log = \"loud\"", &["log", "loud", "warn"]);
        check("workers = ", &["line 1"]);
        check("workers = 1\nworkers = 2", &["workers"]);
    }

    #[test]
    fn an_unknown_variable_is_reported_with_the_nearest_name() {
        #[track_caller]
        fn check(set: &[&str], want: &[&str]) {
            let set = set.iter().map(|&name| name.to_owned()).collect();
            let warnings = unknown_variables(&Line::command(), &set);
            assert_eq!(warnings.len(), want.len(), "{warnings:?}");
            for (warning, want) in warnings.iter().zip(want) {
                assert!(warning.contains(want), "{warning}");
            }
        }
        check(&["DKC_ETCD", "DKC_HTTP", "DKC_CONFIG", "DKC_LOG", "HOME", "DKCX", "DKC_CACHE"], &[]);
        check(
            &["DKC_MIN_INSYNC"],
            &["unknown environment variable DKC_MIN_INSYNC: did you mean DKC_MIN_IN_SYNC?"],
        );
        check(
            &["DKC_WORKRES", "DKC_HTTP_PORT"],
            &["variable DKC_HTTP_PORT", "did you mean DKC_WORKERS?"],
        );
        check(&["DKC_ZZZZZZZZZZZZZZZZZZZZ"], &["unknown environment variable"]);
        // Kubernetes sets these for a service with the name dkc-gateway.
        let service = [
            "DKC_GATEWAY_SERVICE_HOST",
            "DKC_GATEWAY_SERVICE_PORT_HTTP",
            "DKC_GATEWAY_PORT_80_TCP",
        ];
        check(&service, &[]);
        check(&service[1..], &["DKC_GATEWAY_PORT_80_TCP", "DKC_GATEWAY_SERVICE_PORT_HTTP"]);
    }

    #[test]
    fn a_file_that_is_not_there_is_refused_and_a_missing_setting_too() {
        let error = |line| parsed("", line).err().expect("refused");
        assert!(error("dkc gateway --config /no/such/file").contains("/no/such/file"));
        assert!(error("dkc coordinator --config FILE").contains("--name"));
    }
}
