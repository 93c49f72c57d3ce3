//! Values that are a number or a string, such as ports and percentages.
use serde_json::Value;

use crate::names;

/// A number or a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntOrString {
    /// A number.
    Int(i32),
    /// A string: a name, or a percentage.
    String(String),
}

/// A value that stands for no number of things.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntOrStringError {
    /// A string that isn't a percentage.
    #[error("invalid value for IntOrString: invalid type: string is not a percentage")]
    NotAPercentage,
    /// A percentage whose number can't be read.
    #[error("invalid value for IntOrString: invalid value {0:?}")]
    Number(String),
}

impl IntOrString {
    /// Reads a JSON value of the right type.
    pub fn from_value(value: &Value) -> Option<Self> {
        if let Some(text) = value.as_str() {
            return Some(Self::String(text.to_owned()));
        }
        value.as_i64().and_then(|number| i32::try_from(number).ok()).map(Self::Int)
    }

    /// The number, or that percentage of `total`, rounded up or down.
    pub fn scaled(&self, total: i32, round_up: bool) -> Result<i32, IntOrStringError> {
        let percentage = match self {
            Self::Int(number) => return Ok(*number),
            Self::String(text) => {
                let number = text.strip_suffix('%').ok_or(IntOrStringError::NotAPercentage)?;
                let unreadable = |_: std::num::ParseIntError| IntOrStringError::Number(text.clone());
                number.parse::<i32>().map_err(unreadable)?
            }
        };
        let product = i64::from(percentage) * i64::from(total);
        let down = product.div_euclid(100);
        let scaled = if round_up && product.rem_euclid(100) != 0 { down + 1 } else { down };
        Ok(i32::try_from(scaled).unwrap_or(if scaled < 0 { i32::MIN } else { i32::MAX }))
    }

    /// The percentage, if it is written as one.
    pub fn percentage(&self) -> Option<i32> {
        match self {
            Self::Int(_) => None,
            Self::String(text) if names::percent(text).is_empty() => text.trim_end_matches('%').parse().ok(),
            Self::String(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scales() {
        let scaled = |value: Value, up| IntOrString::from_value(&value).unwrap().scaled(10, up);
        assert_eq!(scaled(json!(3), true), Ok(3));
        assert_eq!((scaled(json!("25%"), true), scaled(json!("25%"), false)), (Ok(3), Ok(2)));
        assert_eq!(scaled(json!("100%"), true), Ok(10));
        assert_eq!(scaled(json!("http"), true), Err(IntOrStringError::NotAPercentage));
        assert!(matches!(scaled(json!("x%"), true), Err(IntOrStringError::Number(_))));
        assert_eq!(IntOrString::from_value(&json!(1.5)), None);
        assert_eq!(IntOrString::from_value(&json!("30%")).unwrap().percentage(), Some(30));
    }
}
