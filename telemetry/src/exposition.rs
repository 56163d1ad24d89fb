//! A parser of metrics pages for tests, as strict as Prometheus: a page that a scraper refuses
//! shows nothing at all.

use std::collections::{BTreeMap, BTreeSet};

/// One metric of a page.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Family {
    /// The type: `counter`, `gauge` or `histogram`.
    pub(crate) kind: String,
    /// The values, by name and labels as they are written.
    pub(crate) samples: BTreeMap<String, f64>,
    /// The names of all labels that occur.
    pub(crate) labels: BTreeSet<String>,
}

/// Parses a page into its metrics by name. The error names the first line that is wrong.
pub(crate) fn parse(page: &str) -> Result<BTreeMap<String, Family>, String> {
    let mut families = BTreeMap::<String, Family>::new();
    if !page.ends_with('\n') {
        return Err("the last line has no end".into());
    }
    for line in page.lines() {
        let wrong = |what: &str| format!("{what}: {line:?}");
        if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, kind) = typed.split_once(' ').ok_or_else(|| wrong("no type"))?;
            let known = ["counter", "gauge", "histogram"].contains(&kind);
            if !known || !is_name(name) || (kind == "counter") != name.ends_with("_total") {
                return Err(wrong("a type that does not fit"));
            }
            let family = Family { kind: kind.to_owned(), ..Family::default() };
            if families.insert(name.to_owned(), family).is_some() {
                return Err(wrong("a second type"));
            }
        } else if !line.starts_with('#') {
            let (sample, value) = line.rsplit_once(' ').ok_or_else(|| wrong("no value"))?;
            let value = value.parse().map_err(|_| wrong("no number"))?;
            let (name, labels) = split(sample).ok_or_else(|| wrong("labels"))?;
            let family = families.iter_mut().find(|(family, it)| belongs(name, family, &it.kind));
            let (_, family) = family.ok_or_else(|| wrong("no type before"))?;
            if !is_name(name) || !labels.iter().all(|label| is_name(label)) {
                return Err(wrong("a name"));
            }
            family.labels.extend(labels.into_iter().map(str::to_owned));
            if family.samples.insert(sample.to_owned(), value).is_some() {
                return Err(wrong("a second value"));
            }
        }
    }
    for (name, family) in families.iter().filter(|(_, family)| family.kind == "histogram") {
        check_histogram(name, family)?;
    }
    Ok(families)
}

fn belongs(sample: &str, family: &str, kind: &str) -> bool {
    match sample.strip_prefix(family) {
        Some("") => kind != "histogram",
        Some("_bucket" | "_sum" | "_count") => kind == "histogram",
        _ => false,
    }
}

/// Checks a histogram without labels of its own, as all of ours are: its buckets rise up to `+Inf`,
/// which equals the count.
fn check_histogram(name: &str, family: &Family) -> Result<(), String> {
    let at = |sample: &str| family.samples.get(&format!("{name}{sample}")).copied();
    let bound = |sample: &str| {
        let le = sample.split_once("le=\"")?.1.strip_suffix("\"}")?;
        le.parse::<f64>().ok()
    };
    let mut buckets: Vec<(f64, f64)> = family
        .samples
        .iter()
        .filter_map(|(sample, &count)| Some((bound(sample)?, count)))
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let rises = buckets.is_sorted_by(|a, b| a.1 <= b.1);
    let whole = buckets.last().copied() == at("_count").map(|count| (f64::INFINITY, count));
    if rises && whole && at("_sum").is_some() { Ok(()) } else { Err(format!("{name}: buckets")) }
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Splits a sample into its name and the names of its labels.
fn split(sample: &str) -> Option<(&str, Vec<&str>)> {
    let Some((name, mut rest)) = sample.split_once('{') else { return Some((sample, Vec::new())) };
    let mut labels = Vec::new();
    loop {
        let (label, value) = rest.split_once("=\"")?;
        labels.push(label);
        // A quote ends the value unless it is escaped by a backslash.
        let mut escaped = false;
        let end = value.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        })?;
        match &value[end + 1..] {
            "}" => return Some((name, labels)),
            more => rest = more.strip_prefix(',')?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read() {
        let page = "# HELP a_total What.\n# TYPE a_total counter\n\
                    a_total{op=\"x \\\" y\",code=\"200\"} 3\n\
                    # TYPE h histogram\nh_sum 1.5\nh_count 2\n\
                    h_bucket{le=\"1.0\"} 1\nh_bucket{le=\"+Inf\"} 2\n";
        let families = parse(page).expect("a good page");
        assert_eq!(families["a_total"].labels, ["code", "op"].map(str::to_owned).into());
        assert_eq!(families["h"].kind, "histogram");
        assert_eq!(families["h"].samples["h_count"], 2.0);
    }

    #[test]
    fn what_prometheus_refuses_is_refused() {
        #[track_caller]
        fn check(page: &str, want: &str) {
            let error = parse(page).expect_err("a bad page");
            assert!(error.contains(want), "{error}");
        }
        check("# TYPE a gauge\na 1", "no end");
        check("a 1\n", "no type before");
        check("# TYPE a\n", "no type");
        check("# TYPE a gauge\na\n", "no value");
        check("# TYPE a counter\na_total 1\n", "does not fit");
        check("# TYPE a gauge\n# TYPE a gauge\n", "second type");
        check("# TYPE a gauge\na 1\na 1\n", "second value");
        check("# TYPE a gauge\na x\n", "no number");
        check("# TYPE a gauge\na{b=\"c} 1\n", "labels");
        check("# TYPE a gauge\na{1b=\"c\"} 1\n", "a name");
        check("# TYPE h histogram\nh_sum 1\nh_count 2\nh_bucket{le=\"+Inf\"} 1\n", "buckets");
    }
}
