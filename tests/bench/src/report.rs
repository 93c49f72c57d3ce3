//! The rows that are printed.
#![expect(clippy::print_stdout, reason = "the rows are what this program is for")]

use crate::stats::{Comparison, Estimate, Turns, compare};

/// What was promised of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The value may be at most this.
    AtMost(f64),
    /// The value must be at least this.
    AtLeast(f64),
    /// Nothing was promised; the row explains another.
    None,
}

impl Target {
    fn verdict(self, value: f64) -> &'static str {
        let met = match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
            Self::None => return "",
        };
        if met { "met" } else { "MISSED" }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(bound) => format!("≤ {bound}"),
            Self::AtLeast(bound) => format!("≥ {bound}"),
            Self::None => "-".to_owned(),
        }
    }
}

/// One line of the report.
#[derive(Debug)]
pub(crate) struct Row {
    name: String,
    ours: String,
    peer: String,
    ratio: String,
    target: String,
    verdict: &'static str,
}

impl Row {
    /// A figure that stands alone.
    pub(crate) fn figure(name: &str, samples: Estimate, unit: &str, target: Target) -> Self {
        let Estimate { median, low, high } = samples;
        Self {
            name: name.to_owned(),
            ours: format!("{median:.2} {unit} [{low:.2}, {high:.2}]"),
            peer: "-".to_owned(),
            ratio: "-".to_owned(),
            target: target.text(),
            verdict: target.verdict(median),
        }
    }

    /// Ours against a peer or a floor; `peer` names it.
    pub(crate) fn compared(
        name: &str,
        peer: &str,
        unit: &str,
        compared: &Comparison,
        target: Target,
    ) -> Self {
        let Comparison { left, right, ratio, same } = compared;
        // Where equal things don't look equal, the ratio is not to be trusted.
        let noisy = if same.holds(1.0) { "" } else { " (unsteady)" };
        Self {
            name: name.to_owned(),
            ours: format!("{left:.2} {unit}"),
            peer: format!("{peer}: {right:.2} {unit}"),
            ratio: format!(
                "{:.3} [{:.3}, {:.3}], A/A {:.3} [{:.3}, {:.3}]{noisy}",
                ratio.median, ratio.low, ratio.high, same.median, same.low, same.high
            ),
            target: target.text(),
            verdict: target.verdict(ratio.median),
        }
    }

    /// How many times more the peer takes.
    pub(crate) fn times(
        name: &str,
        peer: &str,
        unit: &str,
        [ours, theirs]: [&[Turns]; 2],
        target: Target,
    ) -> Self {
        let mut compared = compare(theirs, ours);
        (compared.left, compared.right) = (compared.right, compared.left);
        Self::compared(name, peer, unit, &compared, target)
    }
}

/// Prints what the columns are and what they were measured on.
pub(crate) fn head(machine: &str) {
    println!("{machine}");
    println!("| name | ours | peer or floor | ratio [95 %] | target | |");
    println!("| --- | --- | --- | --- | --- | --- |");
}

/// Prints one row.
pub(crate) fn row(row: &Row) {
    let Row { name, ours, peer, ratio, target, verdict } = row;
    println!("| {name} | {ours} | {peer} | {ratio} | {target} | {verdict} |");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_met_up_to_itself() {
        assert_eq!(Target::AtMost(40.0).verdict(40.0), "met");
        assert_eq!(Target::AtMost(40.0).verdict(40.1), "MISSED");
        assert_eq!(Target::AtLeast(5.0).verdict(5.0), "met");
        assert_eq!(Target::AtLeast(5.0).verdict(4.9), "MISSED");
        assert_eq!(Target::None.verdict(1.0), "");
    }

    #[test]
    fn nothing_measured_meets_nothing() {
        assert_eq!(Target::AtMost(1.0).verdict(f64::NAN), "MISSED");
        assert_eq!(Target::AtLeast(1.0).verdict(f64::NAN), "MISSED");
    }
}
