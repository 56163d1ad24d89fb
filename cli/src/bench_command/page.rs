//! The results of a profile as a table, as JSON, as charts, and as a part of a page.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::Path;

use anyhow::Context;
use bench::chart::{self, Bar, short};
use serde::Serialize;

use super::goals::{JudgedGoal, RowMedians};
use super::profile::{BenchProfile, ProfileRow, RowAction, RowSystem};
use super::report::{BenchReport, millis};
use super::rounds::ProfileResults;

/// All results of a profile, as they are stored.
#[derive(Debug, Serialize)]
pub(crate) struct ProfilePage {
    profile: &'static str,
    machine: MachineInfo,
    rounds: u32,
    /// The peers that were not on the machine.
    missing: Vec<&'static str>,
    /// The mistakes in the results; empty if all is well.
    pub(crate) wrong: Vec<String>,
    rows: Vec<PageRow>,
}

#[derive(Debug, Serialize)]
struct MachineInfo {
    cpus: usize,
    cpu: String,
    memory_bytes: u64,
    kernel: String,
}

#[derive(Debug, Serialize)]
struct PageRow {
    name: String,
    medians: RowMedians,
    goals: Vec<JudgedGoal>,
    rounds: Vec<BenchReport>,
    #[serde(skip)]
    axis: Option<(&'static str, Option<f64>)>,
    #[serde(skip)]
    is_ours: bool,
    #[serde(skip)]
    is_closed_loop: bool,
}

impl ProfilePage {
    /// Collects the results of these rows. Rows of missing peers are left out.
    pub(crate) fn new(
        profile: BenchProfile,
        rounds: u32,
        rows: &[ProfileRow],
        results: ProfileResults,
    ) -> Self {
        let of_rounds = |(name, figures): (&String, &Vec<RowMedians>)| {
            (name.clone(), RowMedians::of_rounds(figures))
        };
        let medians: BTreeMap<String, RowMedians> = results.figures.iter().map(of_rounds).collect();
        let page_row = |row: &ProfileRow| {
            let own = medians.get(&row.name)?;
            Some(PageRow {
                name: row.name.clone(),
                medians: own.clone(),
                goals: row.goals.iter().map(|goal| goal.judge(own, &medians)).collect(),
                rounds: results.reports.get(&row.name).cloned().unwrap_or_default(),
                axis: row.axis,
                is_ours: matches!(row.system, RowSystem::Dkc(_)),
                is_closed_loop: matches!(row.action, RowAction::Load(_)) && row.rate_of.is_none(),
            })
        };
        Self {
            profile: profile.name(),
            machine: MachineInfo::read(),
            rounds,
            missing: results.missing.iter().copied().collect(),
            wrong: results.wrong,
            rows: rows.iter().filter_map(page_row).collect(),
        }
    }

    /// Adds what is wrong with reports in which nothing may be refused or missing.
    pub(crate) fn check_fields(&mut self) {
        let wrong: Vec<_> = self.rows.iter().flat_map(PageRow::problems).collect();
        self.wrong.extend(wrong);
    }

    /// Returns the table for people.
    pub(crate) fn table(&self) -> String {
        let rows: Vec<[String; COLUMNS.len()]> = self.rows.iter().map(PageRow::cells).collect();
        let header = COLUMNS.map(str::to_owned);
        let width = |column: usize| {
            let cells = rows.iter().chain([&header]).map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..COLUMNS.len()).map(width).collect();
        let line = |row: &[String; COLUMNS.len()]| {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        [&header].into_iter().chain(&rows).map(line).collect::<Vec<_>>().join("\n")
    }

    /// Writes the results beside `page`, in the folder of its name (`docs/performance.md` has
    /// `docs/performance/`): all figures as JSON, and charts. In the page, the table between the
    /// comments `begin` and `end` of this profile is replaced.
    pub(crate) fn write(&self, page: &Path) -> anyhow::Result<()> {
        let folder = page.with_extension("");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        fs::write(folder.join(format!("{}.json", self.profile)), json)?;
        let mut lines = self.markdown();
        for (name, svg) in self.charts() {
            let file = format!("{}-{name}.svg", self.profile);
            fs::write(folder.join(&file), svg)?;
            let stem = page.file_stem().unwrap_or_default().to_string_lossy();
            lines += &format!("\n![{} {name}]({stem}/{file})\n", self.profile);
        }
        let text = fs::read_to_string(page).with_context(|| page.display().to_string())?;
        let text = replaced(&text, self.profile, &lines).with_context(|| {
            format!("{} has no `<!-- begin {} -->`", page.display(), self.profile)
        })?;
        fs::write(page, text).with_context(|| page.display().to_string())
    }

    fn markdown(&self) -> String {
        let MachineInfo { cpus, cpu, memory_bytes, kernel } = &self.machine;
        let memory = memory_bytes >> 30;
        let rounds = if self.rounds == 1 { "one round" } else { "medians of all rounds" };
        let mut text = format!(
            "{cpus} CPUs ({cpu}), {memory} GiB, Linux {kernel}; rounds: {}, {rounds}.\n\n",
            self.rounds
        );
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        text += &line(&COLUMNS.map(str::to_owned));
        text += &line(&COLUMNS.map(|_| "---".to_owned()));
        self.rows.iter().for_each(|row| text += &line(&row.cells()));
        for name in &self.missing {
            text += &format!("\nNot measured, since it was not installed: {name}.\n");
        }
        text
    }

    /// Returns the charts with their names.
    fn charts(&self) -> Vec<(String, String)> {
        let mut charts = Vec::new();
        for (name, title, is_single) in [
            ("singles", "One per request, operations/s", true),
            ("batches", "Batches and pipelines, increments/s", false),
        ] {
            let rows = self.rows.iter().filter(|row| row.axis.is_none() && row.is_closed_loop);
            let rows = rows.filter(|row| row.batch().is_some_and(|one| (one == 1) == is_single));
            let bar = |row: &PageRow| {
                let value = row.medians.rate?;
                Some(Bar { label: row.name.clone(), value, is_ours: row.is_ours })
            };
            let bars: Vec<_> = rows.filter_map(bar).collect();
            if bars.len() > 1 {
                charts.push((name.to_owned(), chart::bars(title, &bars)));
            }
        }
        let mut axes: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
        for row in &self.rows {
            if let (Some((axis, Some(x))), Some(rate)) = (row.axis, row.medians.rate) {
                axes.entry(axis).or_default().push((x, rate));
            }
        }
        charts.extend(axes.iter().filter(|(_, points)| points.len() > 1).map(|(axis, points)| {
            ((*axis).to_owned(), chart::line(&format!("operations/s by {axis}"), axis, points))
        }));
        charts
    }
}

const COLUMNS: [&str; 9] = [
    "what",
    "rate",
    "p50",
    "p99",
    "CPU each (+ generator)",
    "refused, errors",
    "replicas; acknowledged by; fsync",
    "goal",
    "reached",
];

impl PageRow {
    fn cells(&self) -> [String; COLUMNS.len()] {
        let medians = &self.medians;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let rate = medians.rate.map(|rate| format!("{}/s", short(rate)));
        let ready = medians.ready_after_seconds.map(|time| format!("ready after {time:.1} s"));
        let generator = medians
            .generator_micros
            .map_or(String::new(), |micros| format!(" (+ {})", short(micros)));
        let cpu = medians.server_micros.map(|micros| format!("{} µs{generator}", short(micros)));
        let failures = medians.refused.zip(medians.errors);
        let durability = self.rounds.first().map(|report| {
            let conditions = &report.conditions;
            let [least, _] = conditions.replicas;
            format!("{least}; {}; {}", conditions.acknowledgement, conditions.fsync)
        });
        let joined = |text: fn(&JudgedGoal) -> String| {
            self.goals.iter().map(text).collect::<Vec<_>>().join("; ")
        };
        [
            self.name.clone(),
            or_dash(rate.or(ready)),
            millis(medians.latency.p50_ms),
            millis(medians.latency.p99_ms),
            or_dash(cpu),
            or_dash(failures.map(|(refused, errors)| format!("{refused}, {errors}"))),
            or_dash(durability),
            joined(|goal| goal.goal.clone()),
            joined(|goal| match goal.is_met {
                Some(true) => format!("{} ✓", goal.reached),
                Some(false) => format!("**{}**", goal.reached),
                None => goal.reached.clone(),
            }),
        ]
    }

    fn batch(&self) -> Option<usize> {
        self.rounds.first().map(|report| report.conditions.batch)
    }

    /// Returns the mistakes of this row if nothing may be refused, failed or unknown.
    fn problems(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.medians.latency.p50_ms.is_none() || self.medians.latency.max_ms.is_none() {
            missing.push("no latency".to_owned());
        }
        for report in &self.rounds {
            let measured = &report.measured;
            if measured.requests == 0 {
                missing.push("no request was answered".to_owned());
            }
            for example in [&measured.refusal, &measured.error].into_iter().flatten() {
                missing.push(format!("refused or failed: {example}"));
            }
            if report.server_micros().is_none() || report.generator_micros().is_none() {
                missing.push("no CPU time".to_owned());
            }
            if report.memory_bytes.values().any(Option::is_none) {
                missing.push("no memory".to_owned());
            }
            let work = &report.work;
            let known = [work.ops_per_batch, work.fsyncs_per_second, work.fsync_mean_ms];
            if self.is_ours && (known.contains(&None) || report.state_bytes.is_none()) {
                missing.push("no metrics, or no disk space".to_owned());
            }
        }
        missing.into_iter().map(|what| format!("{}: {what}", self.name)).collect()
    }
}

impl MachineInfo {
    fn read() -> Self {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_once(':'));
            value.map_or(String::new(), |(_, value)| value.trim().to_owned())
        };
        let kibibytes = field(&file("/proc/meminfo"), "MemTotal");
        let kibibytes: u64 = kibibytes.trim_end_matches(" kB").parse().unwrap_or(0);
        Self {
            cpus: std::thread::available_parallelism().map_or(1, NonZero::get),
            cpu: field(&file("/proc/cpuinfo"), "model name"),
            memory_bytes: kibibytes << 10,
            kernel: file("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

/// Replaces what is between the comments of a profile; `None` if the page has none.
fn replaced(page: &str, profile: &str, lines: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- begin {profile} -->\n"), format!("<!-- end {profile} -->"));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{lines}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_command::profile::ProfileLimits;
    use crate::bench_command::report::LatencyQuantiles;

    fn page() -> ProfilePage {
        let limits = ProfileLimits { measured: None, warm_up: None, keys_max: None };
        let rows = BenchProfile::Headline.rows(limits);
        let mut results = ProfileResults::default();
        for (at, row) in rows.iter().enumerate().take(10) {
            let one = RowMedians {
                rate: Some(1000.0 * (at + 1) as f64),
                latency: LatencyQuantiles { p50_ms: Some(0.5), ..LatencyQuantiles::default() },
                ..RowMedians::default()
            };
            let two = RowMedians { rate: one.rate.map(|rate| rate * 2.0), ..one.clone() };
            results.figures.insert(row.name.clone(), vec![one, two]);
        }
        ProfilePage::new(BenchProfile::Headline, 2, &rows, results)
    }

    #[test]
    fn a_table_has_medians_and_goals() {
        let table = page().table();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 11, "rows without figures are left out: {table}");
        assert!(lines[1].starts_with("bare hyper, 256 connections"), "{table}");
        assert!(lines[1].contains("1.5 k/s") && lines[1].contains("0.50 ms"), "{table}");
        assert!(lines[3].contains("≥ 0.7 × bare hyper") && lines[3].contains("3 × ✓"), "{table}");
    }

    #[test]
    fn only_the_part_of_the_profile_is_replaced() {
        let page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n";
        let want = "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb\n";
        assert_eq!(replaced(page, "x", "new\n").as_deref(), Some(want));
        assert_eq!(replaced(want, "x", "new\n").as_deref(), Some(want));
        assert_eq!(replaced(page, "y", "new\n"), None);
    }

    #[test]
    fn results_are_written_beside_the_page() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("performance.md");
        fs::write(&path, "<!-- begin headline -->\n<!-- end headline -->\n").unwrap();
        page().write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("| what | rate |") && text.contains("| 1.5 k/s |"), "{text}");
        let json = fs::read(folder.path().join("performance/headline.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["rows"][0]["medians"]["rate"], 1500.0);
    }
}
