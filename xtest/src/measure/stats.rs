//! Samples and their statistics.

use serde::Serialize;

/// Samples of one kind.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Samples {
    /// The number of samples.
    pub count: usize,
    /// The median.
    pub p50: u64,
    /// The 99th percentile; of fewer than 100 samples the largest.
    pub p99: u64,
    /// The largest sample.
    pub max: u64,
    /// All samples, in the order in which they were taken.
    pub samples: Vec<u64>,
}

impl From<Vec<u64>> for Samples {
    fn from(samples: Vec<u64>) -> Self {
        Self {
            count: samples.len(),
            p50: quantile(&samples, 50),
            p99: quantile(&samples, 99),
            max: samples.iter().copied().max().unwrap_or(0),
            samples,
        }
    }
}

/// The percentile `percent` of sorted samples.
pub fn quantile(values: &[u64], percent: usize) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last * percent).div_ceil(100))
        .copied()
        .unwrap_or(0)
}

/// `a` divided by `b`.
#[allow(clippy::cast_precision_loss)] // microseconds and picoseconds of a second's work
pub fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples_and_the_last_of_few_is_the_largest() {
        let all: Vec<u64> = (1..=200).rev().collect();
        let of = Samples::from(all);
        assert_eq!((of.count, of.p50, of.p99, of.max), (200, 101, 199, 200));
        let few = Samples::from(vec![7, 3, 9]);
        assert_eq!((few.p50, few.p99, few.max), (7, 9, 9));
        assert_eq!(Samples::from(Vec::new()).max, 0);
    }
}
