//! Charts as SVG: bars for systems side by side, a line for a figure along an axis.
//!
//! A chart has a white background of its own, so that it can be read on any page.

const WIDTH: f64 = 860.0;
const LEFT: f64 = 360.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 46.0;
const BAR: f64 = 20.0;
const ROW: f64 = 28.0;
const PLOT_HEIGHT: f64 = 260.0;
const PLOT_LEFT: f64 = 80.0;
const OURS: &str = "#2f6fb3";
const OTHERS: &str = "#b8bec6";

/// A bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// The text on its left.
    pub label: String,
    /// The length; not negative.
    pub value: f64,
    /// True for what is ours, which has a colour of its own.
    pub is_ours: bool,
}

/// Draws horizontal bars, with their values on the right.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let height = TOP + ROW * bars.len() as f64 + 14.0;
    let longest = bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
    let mut svg = begin(title, height);
    for (row, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let share = if longest > 0.0 { bar.value / longest } else { 0.0 };
        let width = share * (WIDTH - LEFT - RIGHT);
        let fill = if bar.is_ours { OURS } else { OTHERS };
        let baseline = y + BAR - 5.0;
        text(&mut svg, LEFT - 8.0, baseline, "end", &bar.label);
        svg += &format!(
            "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" \
             fill=\"{fill}\"/>\n"
        );
        text(&mut svg, LEFT + width + 6.0, baseline, "start", &short(bar.value));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Draws a line through points, whose x is placed by its logarithm. Points are in the order of x,
/// which is above 0.
pub fn line(title: &str, x_name: &str, points: &[(f64, f64)]) -> String {
    let height = TOP + PLOT_HEIGHT + 50.0;
    let mut svg = begin(title, height);
    let highest = points.iter().map(|point| point.1).fold(0.0, f64::max);
    let ends = points.first().zip(points.last()).map(|(first, last)| (first.0.ln(), last.0.ln()));
    let (low, high) = ends.unwrap_or((0.0, 0.0));
    let place = |(x, y): (f64, f64)| {
        let along = if high > low { (x.ln() - low) / (high - low) } else { 0.5 };
        let up = if highest > 0.0 { y / highest } else { 0.0 };
        let width = WIDTH - PLOT_LEFT - RIGHT;
        (PLOT_LEFT + along * width, TOP + PLOT_HEIGHT * (1.0 - up))
    };
    let bottom = TOP + PLOT_HEIGHT;
    let right = WIDTH - RIGHT;
    svg += &format!(
        "<path d=\"M{PLOT_LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>\n"
    );
    let placed: Vec<_> = points.iter().map(|&point| place(point)).collect();
    let path: Vec<_> = placed.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let path = path.join(" ");
    svg += &format!(
        "<polyline points=\"{path}\" fill=\"none\" stroke=\"{OURS}\" stroke-width=\"2\"/>\n"
    );
    for (&(x, y), &(left, up)) in points.iter().zip(&placed) {
        svg += &format!("<circle cx=\"{left:.1}\" cy=\"{up:.1}\" r=\"3\" fill=\"{OURS}\"/>\n");
        text(&mut svg, left, up - 8.0, "middle", &short(y));
        text(&mut svg, left, bottom + 18.0, "middle", &short(x));
    }
    text(&mut svg, (PLOT_LEFT + WIDTH - RIGHT) / 2.0, bottom + 40.0, "middle", x_name);
    svg.push_str("</svg>\n");
    svg
}

fn begin(title: &str, height: f64) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\" role=\"img\">\n<rect width=\"{WIDTH}\" \
         height=\"{height}\" fill=\"#fff\"/>\n<title>{}</title>\n",
        escaped(title)
    );
    text(&mut svg, 14.0, 26.0, "start", title);
    svg
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    let content = escaped(content);
    *svg += &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>\n");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Returns a number with three significant digits: `1.62 M`, `48.1 k`, `0.56`.
pub fn short(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        huge if huge >= 999.5e6 => (value / 1e9, " G"),
        large if large >= 999.5e3 => (value / 1e6, " M"),
        medium if medium >= 999.5 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        tens if tens >= 99.95 => 0,
        ones if ones >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let is_fraction = text.contains('.');
    let text = if is_fraction { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let numbers =
            [0.0, 0.564, 9.0, 48.12, 999.4, 1000.0, 48_123.0, 239_000.0, 1_620_000.0, 2e9];
        let want = ["0", "0.56", "9", "48.1", "999", "1 k", "48.1 k", "239 k", "1.62 M", "2 G"];
        assert_eq!(numbers.map(short), want);
    }

    #[test]
    fn bars_are_in_proportion() {
        let bar = |label: &str, value, is_ours| Bar { label: label.to_owned(), value, is_ours };
        let svg = bars("rates <1/s>", &[bar("dkc & co", 50.0, true), bar("hello", 100.0, false)]);
        let whole = WIDTH - LEFT - RIGHT;
        assert!(
            svg.contains(&format!("width=\"{:.1}\" height=\"20\" fill=\"{OURS}\"", whole / 2.0))
        );
        assert!(svg.contains(&format!("width=\"{whole:.1}\" height=\"20\" fill=\"{OTHERS}\"")));
        assert!(svg.contains("dkc &amp; co") && svg.contains("rates &lt;1/s&gt;"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn a_line_is_logarithmic_in_x() {
        let svg = line("t", "batch", &[(1.0, 0.0), (10.0, 50.0), (100.0, 100.0)]);
        let middle = PLOT_LEFT + (WIDTH - PLOT_LEFT - RIGHT) / 2.0;
        let points = format!(
            "{PLOT_LEFT:.1},{:.1} {middle:.1},{:.1} {:.1},{TOP:.1}",
            TOP + PLOT_HEIGHT,
            TOP + PLOT_HEIGHT / 2.0,
            WIDTH - RIGHT
        );
        assert!(svg.contains(&points), "{svg}");
    }

    #[test]
    fn charts_of_nothing_are_charts() {
        assert!(bars("t", &[]).ends_with("</svg>\n"));
        assert!(line("t", "x", &[]).ends_with("</svg>\n"));
        assert!(
            !bars("t", &[Bar { label: String::new(), value: 0.0, is_ours: true }]).contains("NaN")
        );
        assert!(!line("t", "x", &[(1.0, 0.0)]).contains("NaN"));
    }
}
