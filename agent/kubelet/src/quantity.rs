//! Reads Kubernetes quantities (`500m`, `64Mi`, `1e3`) as exact thousandths.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of the unit, rounded up; `None` if the text is no quantity or does not fit.
pub(crate) fn milli(text: &str) -> Option<i128> {
    let digits_end = text
        .char_indices()
        .find(|&(i, c)| !(c.is_ascii_digit() || c == '.' || (i == 0 && (c == '+' || c == '-'))))
        .map_or(text.len(), |(i, _)| i);
    let (number, suffix) = text.split_at(digits_end);
    let (negative, number) = match number.as_bytes().first()? {
        b'-' => (true, &number[1..]),
        b'+' => (false, &number[1..]),
        _ => (false, number),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let (multiplier, divisor) = scale(suffix)?;
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let fraction_scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = mantissa.checked_mul(multiplier)?.checked_mul(1000)?;
    let denominator = fraction_scale.checked_mul(divisor)?;
    let magnitude = numerator.checked_add(denominator - 1)?.checked_div(denominator)?;
    Some(if negative { -magnitude } else { magnitude })
}

fn scale(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let factor = 10_i128.checked_pow(power.unsigned_abs())?;
            if power < 0 { (1, factor) } else { (factor, 1) }
        }
    })
}

/// Thousandths; an unreadable quantity (the API server refuses those) counts as none.
pub(crate) fn milli_of(quantity: &Quantity) -> i64 {
    milli(&quantity.0).and_then(|m| i64::try_from(m).ok()).unwrap_or(0)
}

/// Whole units, rounded up.
pub(crate) fn value_of(quantity: &Quantity) -> i64 {
    milli(&quantity.0).and_then(|m| i64::try_from((m + 999).div_euclid(1000)).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_suffix_exactly() {
        for (text, expected) in [
            ("1", Some(1000)),
            ("500m", Some(500)),
            ("0.1", Some(100)),
            (".5", Some(500)),
            ("64Mi", Some(64 * 1024 * 1024 * 1000)),
            ("1.5Gi", Some(3 * 512 * 1024 * 1024 * 1000)),
            ("1e3", Some(1_000_000)),
            ("12E-1", Some(1200)),
            ("1n", Some(1)),
            ("-2", Some(-2000)),
            ("2E", Some(2_000_000_000_000_000_000_000)),
            ("", None),
            ("abc", None),
            ("1.2.3", None),
            ("1Zi", None),
        ] {
            assert_eq!(milli(text), expected, "{text}");
        }
        assert_eq!(value_of(&Quantity("1500m".into())), 2);
        assert_eq!(milli_of(&Quantity("1500m".into())), 1500);
    }
}
