//! Medians, quantiles and bootstrap intervals; the order in which sides take turns. Pure.

/// Resamples of a bootstrap; more change no shown digit.
const RESAMPLES: usize = 2000;

/// A median with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    /// The median.
    pub(crate) median: f64,
    /// Lower end of the interval.
    pub(crate) low: f64,
    /// Upper end of the interval.
    pub(crate) high: f64,
}

impl Estimate {
    /// Whether the interval holds a value.
    pub(crate) fn holds(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }
}

/// The value below which a share of the samples lies, interpolated; NaN of no samples.
pub(crate) fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share.clamp(0.0, 1.0) * as_f64(last);
    let below = (0..=last).rev().find(|&index| as_f64(index) <= place).unwrap_or(0);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - as_f64(below))
}

/// The middle of the samples.
pub(crate) fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The median and its percentile bootstrap interval; the same samples always give the same interval.
pub(crate) fn estimate(samples: &[f64]) -> Estimate {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut medians = Vec::with_capacity(RESAMPLES);
    let mut resample = vec![0.0; samples.len()];
    for _ in 0..RESAMPLES {
        for slot in &mut resample {
            *slot = samples[random.below(samples.len())];
        }
        medians.push(median(&resample));
    }
    Estimate { median: median(samples), low: quantile(&medians, 0.025), high: quantile(&medians, 0.975) }
}

/// Indices of the sides in one round, there and back: `0 1 … n-1 n-1 … 1 0`, so that drift hits all alike.
pub(crate) fn there_and_back(sides: usize) -> impl Iterator<Item = usize> {
    (0..sides).chain((0..sides).rev())
}

/// What one round measured of one side: the first and the second turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turns(pub(crate) f64, pub(crate) f64);

impl Turns {
    fn mean(self) -> f64 {
        f64::midpoint(self.0, self.1)
    }
}

/// How two sides compare over all rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Comparison {
    /// Median of the first side.
    pub(crate) left: f64,
    /// Median of the second side.
    pub(crate) right: f64,
    /// First divided by second, round by round.
    pub(crate) ratio: Estimate,
    /// Each side's first turn divided by its second: what the method sees where there is no difference.
    pub(crate) same: Estimate,
}

/// Compares two sides round by round.
pub(crate) fn compare(left: &[Turns], right: &[Turns]) -> Comparison {
    let means = |turns: &[Turns]| turns.iter().map(|turn| turn.mean()).collect::<Vec<f64>>();
    let ratios: Vec<f64> = left.iter().zip(right).map(|(l, r)| l.mean() / r.mean()).collect();
    let same: Vec<f64> = left.iter().chain(right).map(|turn| turn.0 / turn.1).collect();
    Comparison {
        left: median(&means(left)),
        right: median(&means(right)),
        ratio: estimate(&ratios),
        same: estimate(&same),
    }
}

/// A count as a number to reckon with.
pub(crate) fn as_f64(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// xorshift64*: resampling needs no more.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let value = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(value).map_or(0, |value| value % bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate_between_sorted_samples() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(quantile(&[0.0, 10.0], 0.99), 9.9);
        assert_eq!(quantile(&[5.0], 0.01), 5.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn an_interval_encloses_its_median_and_repeats_itself() {
        let samples: Vec<f64> = (0..31).map(|n| f64::from(n % 7)).collect();
        let first = estimate(&samples);
        assert!(first.holds(first.median), "{first:?}");
        assert!(first.low < first.high, "{first:?}");
        assert_eq!(first, estimate(&samples));
    }

    #[test]
    fn equal_samples_leave_no_spread() {
        assert_eq!(estimate(&[2.0; 11]), Estimate { median: 2.0, low: 2.0, high: 2.0 });
    }

    #[test]
    fn an_outlier_moves_neither_median_nor_interval_far() {
        let mut samples = vec![1.0; 20];
        samples.push(1000.0);
        assert_eq!(estimate(&samples), Estimate { median: 1.0, low: 1.0, high: 1.0 });
    }

    #[test]
    fn sides_take_turns_there_and_back() {
        assert_eq!(there_and_back(2).collect::<Vec<_>>(), [0, 1, 1, 0]);
        assert_eq!(there_and_back(3).collect::<Vec<_>>(), [0, 1, 2, 2, 1, 0]);
    }

    #[test]
    fn a_drift_over_the_round_cancels_out_of_the_ratio() {
        // Turns A B B A while the machine gets slower by 1 each turn; A takes 10, B takes 20.
        let left: Vec<Turns> = (0..11).map(|_| Turns(10.0, 13.0)).collect();
        let right: Vec<Turns> = (0..11).map(|_| Turns(21.0, 22.0)).collect();
        let compared = compare(&left, &right);
        assert_eq!(compared.ratio.median, 11.5 / 21.5);
        assert!(compared.same.median < 1.0);
    }

    #[test]
    fn a_difference_shows_as_a_ratio() {
        let left: Vec<Turns> = (0..11).map(|n| Turns(2.0 + f64::from(n), 2.0 + f64::from(n))).collect();
        let right: Vec<Turns> =
            (0..11).map(|n| Turns(1.0 + f64::from(n) / 2.0, 1.0 + f64::from(n) / 2.0)).collect();
        let compared = compare(&left, &right);
        assert_eq!(compared.ratio, Estimate { median: 2.0, low: 2.0, high: 2.0 });
        assert!(compared.same.holds(1.0));
    }
}
