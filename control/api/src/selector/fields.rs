//! Field selectors: `metadata.name=web,status.phase!=Running`.
use std::fmt;

use super::{Labels, SelectorError};

/// One condition on one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldRequirement {
    /// The field's path.
    pub field: String,
    /// The value must be equal; else it must differ.
    pub equal: bool,
    /// The value.
    pub value: String,
}

/// Conditions on fields, all of which must hold. Which fields a kind has is the kind's matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<FieldRequirement>,
}

impl FieldSelector {
    /// Selects every object.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Parses the text form. `\`, `,` and `=` in values are escaped by a backslash.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for term in split_terms(text) {
            if term.is_empty() {
                continue;
            }
            let Some((field, equal, value)) = split_term(term) else {
                return Err(SelectorError::Term { selector: text.to_owned(), term: term.to_owned() });
            };
            requirements.push(FieldRequirement { field: field.to_owned(), equal, value: unescape(value)? });
        }
        Ok(Self { requirements })
    }

    /// Whether it selects an object with these fields. A field that isn't there is empty.
    pub fn matches(&self, fields: &(impl Labels + ?Sized)) -> bool {
        self.requirements.iter().all(|requirement| {
            let equal = fields.label(&requirement.field).unwrap_or_default() == requirement.value;
            equal == requirement.equal
        })
    }

    /// The value that the field must have, if the selector says one.
    pub fn requires_exactly(&self, field: &str) -> Option<&str> {
        let found =
            self.requirements.iter().find(|requirement| requirement.equal && requirement.field == field);
        found.map(|requirement| requirement.value.as_str())
    }

    /// Whether it selects every object.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The conditions, in the order of the text.
    pub fn requirements(&self) -> &[FieldRequirement] {
        &self.requirements
    }
}

impl fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, requirement) in self.requirements.iter().enumerate() {
            let value = requirement.value.replace('\\', r"\\").replace(',', r"\,").replace('=', r"\=");
            let operator = if requirement.equal { "=" } else { "!=" };
            write!(f, "{}{}{operator}{value}", if at > 0 { "," } else { "" }, requirement.field)?;
        }
        Ok(())
    }
}

/// Splits at commas that aren't escaped.
fn split_terms(text: &str) -> Vec<&str> {
    let (mut terms, mut start, mut escaped) = (Vec::new(), 0, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn split_term(term: &str) -> Option<(&str, bool, &str)> {
    let at = term.find(['=', '!'])?;
    let (field, rest) = term.split_at(at);
    if let Some(value) = rest.strip_prefix("!=") {
        return Some((field, false, value));
    }
    let value = rest.strip_prefix("==").or_else(|| rest.strip_prefix('='))?;
    Some((field, true, value))
}

fn unescape(value: &str) -> Result<String, SelectorError> {
    let invalid = || SelectorError::Escape(value.to_owned());
    let mut text = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(escaped @ ('\\' | ',' | '=')) => text.push(escaped),
                _ => return Err(invalid()),
            },
            ',' | '=' => return Err(invalid()),
            c => text.push(c),
        }
    }
    Ok(text)
}
