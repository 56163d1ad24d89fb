//! The metrics of processes: their pages `/metrics` before and after a run.

use std::collections::BTreeMap;
use std::time::Duration;

use client::{HttpConnection, HttpRequest, Url};

use crate::cpu::MeasuredProcess;

/// The time limit of reading one page.
const WITHIN: Duration = Duration::from_secs(2);

/// The sums of all metrics of a role, over labels and processes, by name.
pub type MetricSums = BTreeMap<String, f64>;

/// Reads the metrics of these processes, by role. A role is absent if a process of it does not
/// answer.
pub async fn read(processes: &[MeasuredProcess]) -> BTreeMap<String, MetricSums> {
    let mut roles: BTreeMap<String, Option<MetricSums>> = BTreeMap::new();
    for process in processes {
        let Some(address) = &process.metrics else { continue };
        let page = page(address).await;
        let sums = roles.entry(process.role.clone()).or_insert_with(|| Some(MetricSums::new()));
        *sums = sums.take().zip(page).map(|(mut sums, page)| {
            add(&page, &mut sums);
            sums
        });
    }
    roles.into_iter().filter_map(|(role, sums)| Some((role, sums?))).collect()
}

async fn page(address: &str) -> Option<String> {
    let url = Url::parse(&format!("http://{address}")).ok()?;
    let request = HttpRequest::get(&url, "/metrics", WITHIN);
    let answer = HttpConnection::new(url).call(&request, WITHIN).await.ok()?;
    (answer.status == 200).then(|| String::from_utf8_lossy(&answer.body).into_owned())
}

/// Adds the samples of a page in Prometheus' text format to the sums.
fn add(page: &str, sums: &mut MetricSums) {
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        // A value of a label may contain spaces and braces, but the sample's value does not.
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or(series).trim();
        if let Ok(value) = value.parse::<f64>() {
            *sums.entry(name.to_owned()).or_default() += value;
        }
    }
}

/// Returns how much the metric `name` of `role` grew; `None` if it is not there.
pub fn growth(
    role: &str,
    name: &str,
    before: &BTreeMap<String, MetricSums>,
    after: &BTreeMap<String, MetricSums>,
) -> Option<f64> {
    Some(after.get(role)?.get(name)? - before.get(role)?.get(name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_added_up_over_labels() {
        let page = "# HELP dkc_requests_total Requests\n# TYPE dkc_requests_total counter\n\
                    dkc_requests_total{operation=\"a b}\",status=\"200\"} 5\n\
                    dkc_requests_total{operation=\"c\",status=\"429\"} 2\n\
                    dkc_fsync_seconds_count 7\ndkc_fsync_seconds_sum 0.25\nnonsense\n";
        let mut sums = MetricSums::new();
        add(page, &mut sums);
        add("dkc_fsync_seconds_count 3", &mut sums);
        assert_eq!(sums["dkc_requests_total"], 7.0);
        assert_eq!(sums["dkc_fsync_seconds_count"], 10.0);
        assert_eq!(sums["dkc_fsync_seconds_sum"], 0.25);
        assert_eq!(sums.len(), 3);
    }

    #[test]
    fn growth_needs_both_pages() {
        let role = |value: f64| {
            BTreeMap::from([("node".to_owned(), MetricSums::from([("x".to_owned(), value)]))])
        };
        let none = BTreeMap::new();
        assert_eq!(growth("node", "x", &role(3.0), &role(8.0)), Some(5.0));
        assert_eq!(growth("node", "x", &none, &role(8.0)), None);
        assert_eq!(growth("node", "y", &role(3.0), &role(8.0)), None);
    }
}
