//! Quantities of resources, such as `500m` or `1Gi`: parsing, arithmetic, canonical text.
//!
//! Every quantity is a whole number of billionths below 2^63 in magnitude, so an `i128` of billionths holds each exactly.
use std::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    ops::{Add, AddAssign, Neg, Sub, SubAssign},
    str::FromStr,
};

const NANOS_PER_UNIT: i128 = 1_000_000_000;
const NANOS_PER_MILLI: i128 = 1_000_000;
/// Larger amounts are capped here.
const MAX_NANOS: i128 = i64::MAX as i128 * NANOS_PER_UNIT;
/// Digits of a mantissa beyond which no value under the cap can lie.
const MAX_DIGITS: usize = 30;

/// Text that is no quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with a suffix.
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    /// The suffix isn't known.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// How a quantity likes to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `1500m`, `2k`.
    DecimalSi,
    /// `2Ki`, `1Gi`.
    BinarySi,
    /// `12e6`.
    DecimalExponent,
}

/// An amount. Equality and order look at the amount alone, not at the format.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nanos: 0, format: Format::DecimalSi };

    /// Whole units.
    pub fn from_units(units: i64, format: Format) -> Self {
        Self { nanos: i128::from(units) * NANOS_PER_UNIT, format }
    }

    /// Thousandths.
    pub fn from_millis(millis: i64) -> Self {
        Self { nanos: i128::from(millis) * NANOS_PER_MILLI, format: Format::DecimalSi }
    }

    /// Units, rounded up.
    pub fn units(&self) -> i64 {
        self.scaled(NANOS_PER_UNIT)
    }

    /// Thousandths, rounded up; the largest `i64` if there are more.
    pub fn millis(&self) -> i64 {
        self.scaled(NANOS_PER_MILLI)
    }

    fn scaled(&self, nanos_per: i128) -> i64 {
        let down = self.nanos.div_euclid(nanos_per);
        let up = down + i128::from(self.nanos.rem_euclid(nanos_per) != 0);
        i64::try_from(up).unwrap_or(if up < 0 { i64::MIN } else { i64::MAX })
    }

    /// How it is written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether it is nothing.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// -1, 0 or 1.
    pub fn signum(&self) -> i8 {
        match self.nanos.cmp(&0) {
            Ordering::Less => -1,
            Ordering::Equal => 0,
            Ordering::Greater => 1,
        }
    }

    fn capped(nanos: i128, format: Format) -> Self {
        Self { nanos: nanos.clamp(-MAX_NANOS, MAX_NANOS), format }
    }
}

/// What a suffix multiplies by.
enum Factor {
    Ten(i32),
    Two(u32),
}

fn parse_suffix(suffix: &str) -> Result<(Factor, Format), QuantityError> {
    let decimal = |exponent| Ok((Factor::Ten(exponent), Format::DecimalSi));
    let binary = |exponent| Ok((Factor::Two(exponent), Format::BinarySi));
    match suffix {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError::Suffix)?;
            let exponent = exponent.parse().ok().ok_or(QuantityError::Suffix)?;
            Ok((Factor::Ten(exponent), Format::DecimalExponent))
        }
    }
}

/// `digits` × 10^`exponent` billionths, away from zero if it doesn't come out even; at most a bit over the cap.
fn shift(digits: &str, exponent: i64) -> i128 {
    let digits = digits.trim_start_matches('0');
    let length = i64::try_from(digits.len()).unwrap_or(i64::MAX);
    if digits.is_empty() {
        return 0;
    }
    if length.saturating_add(exponent) > MAX_DIGITS as i64 {
        return MAX_NANOS;
    }
    // Digits beyond the last billionth only matter for rounding up.
    let keep = usize::try_from((length + exponent.min(0)).max(0)).unwrap_or(0);
    let kept = digits[..keep].parse::<i128>().unwrap_or(0);
    let lost = digits[keep..].bytes().any(|digit| digit != b'0');
    let power = u32::try_from(exponent.max(0)).unwrap_or(0);
    (kept + i128::from(lost)).saturating_mul(10_i128.saturating_pow(power))
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return Err(QuantityError::Format);
        }
        let letters = suffix.trim_start_matches(|c: char| "eEinumkKMGTP".contains(c));
        let exponent = letters.strip_prefix(['+', '-']).unwrap_or(letters);
        if !exponent.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(QuantityError::Format);
        }
        let (factor, format) = parse_suffix(suffix)?;
        let digits = format!("{whole}{fraction}");
        let places = i64::try_from(fraction.len()).unwrap_or(i64::MAX);
        let nanos = match factor {
            Factor::Ten(exponent) => shift(&digits, 9 + i64::from(exponent) - places),
            Factor::Two(exponent) => {
                // A binary suffix on a fraction: multiply first, so that nothing is rounded twice.
                let trimmed = digits.trim_start_matches('0');
                let mantissa = trimmed.parse::<i128>().ok().filter(|_| trimmed.len() <= 20);
                match (trimmed.is_empty(), mantissa.and_then(|m| m.checked_mul(1 << exponent))) {
                    (true, _) => 0,
                    (_, Some(product)) => shift(&product.to_string(), 9 - places),
                    (_, None) => shift(&digits, 9 - places).saturating_mul(1 << exponent),
                }
            }
        };
        // So small a number of bytes is meant to be some.
        let nanos = if format == Format::BinarySi && nanos > 0 { nanos.max(NANOS_PER_UNIT) } else { nanos };
        Ok(Self::capped(if text.starts_with('-') { -nanos } else { nanos }, format))
    }
}

const DECIMAL_SUFFIXES: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
const BINARY_SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        let whole = self.nanos % NANOS_PER_UNIT == 0;
        if self.format == Format::BinarySi && whole && self.nanos.abs() >= 1024 * NANOS_PER_UNIT {
            let mut number = self.nanos / NANOS_PER_UNIT;
            let mut step = 0;
            while number % 1024 == 0 && step + 1 < BINARY_SUFFIXES.len() {
                number /= 1024;
                step += 1;
            }
            return write!(f, "{number}{}", BINARY_SUFFIXES[step]);
        }
        let mut number = self.nanos;
        let mut step = 0;
        while number % 1000 == 0 && step + 1 < DECIMAL_SUFFIXES.len() {
            number /= 1000;
            step += 1;
        }
        match (self.format, step) {
            (Format::DecimalExponent, 3) => write!(f, "{number}"),
            (Format::DecimalExponent, _) => {
                write!(f, "{number}e{}", i32::try_from(step).unwrap_or(0) * 3 - 9)
            }
            (Format::DecimalSi | Format::BinarySi, _) => write!(f, "{number}{}", DECIMAL_SUFFIXES[step]),
        }
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl Hash for Quantity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.nanos.hash(state);
    }
}

/// Sums are capped like every quantity, and written like the left side, unless that is nothing.
impl Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self::capped(self.nanos + other.nanos, if self.is_zero() { other.format } else { self.format })
    }
}

impl Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Neg for Quantity {
    type Output = Self;

    fn neg(self) -> Self {
        Self { nanos: -self.nanos, format: self.format }
    }
}

impl AddAssign for Quantity {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl SubAssign for Quantity {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        text.parse::<Quantity>().unwrap().to_string()
    }

    #[test]
    fn canonical_form_is_upstreams() {
        for (text, expected) in [
            ("0", "0"),
            ("0.0Gi", "0"),
            ("1000m", "1"),
            ("0.5", "500m"),
            (".5", "500m"),
            ("5.", "5"),
            ("1.5", "1500m"),
            ("+100m", "100m"),
            ("-0.1", "-100m"),
            ("1000", "1k"),
            ("1024", "1024"),
            ("12000k", "12M"),
            ("1024Mi", "1Gi"),
            ("1Gi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Ki", "512"),
            ("1500Mi", "1500Mi"),
            ("0.1Mi", "104857600m"),
            ("100.1Ki", "102502400m"),
            ("0.001Ki", "1024m"),
            ("0.0001Ki", "1"),
            ("1e3", "1e3"),
            ("12E6", "12e6"),
            ("1e0", "1"),
            ("1e-3", "1e-3"),
            ("100n", "100n"),
            ("0.1n", "1n"),
            ("1E", "1E"),
            ("1Ei", "1Ei"),
            ("99999999999999999999", "9223372036854775807"),
            ("1000000000000000000000000000000000000000000", "9223372036854775807"),
            ("1e99", "9223372036854775807"),
            ("100Ei", "9223372036854775807"),
        ] {
            assert_eq!(canonical(text), expected, "{text}");
        }
    }

    #[test]
    fn refuses_what_is_none() {
        for text in ["", "x", "1.2.3", "--1", ".", "1 ", " 1", "1Gi2x", "+"] {
            assert_eq!(text.parse::<Quantity>(), Err(QuantityError::Format), "{text:?}");
        }
        for text in ["1K", "1Kib", "1mi", "1e", "1Gi2", "1+3"] {
            assert!(text.parse::<Quantity>().is_err(), "{text:?}");
        }
        assert_eq!("1K".parse::<Quantity>(), Err(QuantityError::Suffix));
    }

    #[test]
    fn values_round_up() {
        let quantity = |text: &str| text.parse::<Quantity>().unwrap();
        assert_eq!((quantity("1500m").units(), quantity("1500m").millis()), (2, 1500));
        assert_eq!((quantity("-1500m").units(), quantity("1n").millis()), (-1, 1));
        assert_eq!(quantity("1Gi").units(), 1 << 30);
        assert_eq!(quantity("8E").millis(), i64::MAX);
        assert_eq!(quantity("1Gi") + quantity("1Mi"), quantity("1025Mi"));
        assert_eq!((quantity("1Gi") - quantity("512Mi")).to_string(), "512Mi");
        assert_eq!((Quantity::ZERO + quantity("1Gi")).to_string(), "1Gi");
        assert!(quantity("1") > quantity("999m") && quantity("1") == quantity("1000m"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[-+0-9.eEinumkKMGTP]{0,12}") {
            if let Ok(quantity) = text.parse::<Quantity>() {
                let again: Quantity = quantity.to_string().parse().unwrap();
                prop_assert_eq!(again, quantity);
                prop_assert_eq!(again.to_string(), quantity.to_string());
            }
        }

        #[test]
        fn sums_agree_with_integers(a in -1_000_000_000_i64..1_000_000_000, b in -1_000_000_000_i64..1_000_000_000) {
            let sum = Quantity::from_millis(a) + Quantity::from_millis(b);
            prop_assert_eq!(sum.millis(), a + b);
            prop_assert_eq!((sum - Quantity::from_millis(b)).millis(), a);
            prop_assert_eq!(Quantity::from_millis(a).cmp(&Quantity::from_millis(b)), a.cmp(&b));
        }
    }
}
