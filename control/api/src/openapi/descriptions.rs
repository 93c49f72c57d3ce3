//! What upstream says of each type and field. The table lies in the binary compressed; it is unpacked for a document and not kept.

use std::collections::HashMap;

include!(concat!(env!("OUT_DIR"), "/descriptions.rs"));

static TABLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptions.zst"));

/// A type that has `apiVersion` and `kind` for fields.
const TYPED: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";

/// The descriptions, by type and field; by default there are none.
#[derive(Default)]
pub(super) struct Descriptions {
    text: String,
    /// Where the entries of a type begin and end in the text.
    types: HashMap<String, (usize, usize)>,
}

/// What a document changes with, beside the facts.
pub(super) fn packed() -> &'static [u8] {
    TABLE
}

impl Descriptions {
    pub(super) fn unpack() -> Self {
        // The build made both in one go.
        let text = zstd::bulk::decompress(TABLE, UNPACKED_BYTES).expect("the build packed the descriptions");
        let text = String::from_utf8(text).expect("the build packed text");
        let mut types = HashMap::new();
        let mut last: Option<(&str, usize)> = None;
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            if let Some(name) = line.strip_prefix('=')
                && let Some((name, begin)) = last.replace((name.trim_end(), at + line.len()))
            {
                types.insert(name.to_owned(), (begin, at));
            }
            at += line.len();
        }
        if let Some((name, begin)) = last {
            types.insert(name.to_owned(), (begin, at));
        }
        Self { text, types }
    }

    /// What is said of a type itself (no field), or of a field of it.
    pub(super) fn of(&self, name: &str, field: &str) -> Option<String> {
        let own = self.entry(name, field);
        // The crate says these two of each kind by its traits, and has their text where they are a field.
        let everywhere =
            || ["apiVersion", "kind"].contains(&field).then(|| self.entry(TYPED, field)).flatten();
        own.or_else(everywhere)
    }

    fn entry(&self, name: &str, field: &str) -> Option<String> {
        let (begin, end) = *self.types.get(name)?;
        let mut lines = self.text[begin..end].lines();
        let said = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(' '))?;
        Some(unescaped(said))
    }
}

fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(one) = characters.next() {
        if one != '\\' {
            plain.push(one);
            continue;
        }
        match characters.next() {
            Some('n') => plain.push('\n'),
            next => plain.extend(next),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Schema;

    #[test]
    fn almost_every_field_of_the_schema_is_described() {
        let descriptions = Descriptions::unpack();
        let (mut all, mut missing) = (0, Vec::new());
        for (_, definition) in Schema::builtin().iter().filter(|(_, one)| !one.name.ends_with("List")) {
            for field in &definition.fields {
                all += 1;
                let said = descriptions.of(&definition.name, &field.name);
                if said.is_none_or(|said| said.trim().is_empty()) {
                    missing.push(format!("{}.{}", definition.name, field.name));
                }
            }
        }
        assert!(all > 2_500 && missing.len() < 80, "{} of {all}: {missing:?}", missing.len());
    }

    #[test]
    fn text_is_as_upstream_has_it() {
        let descriptions = Descriptions::unpack();
        let pod = descriptions.of("io.k8s.api.core.v1.PodSpec", "").unwrap();
        assert_eq!(pod, "PodSpec is a description of a pod.");
        let quantity = descriptions.of("io.k8s.apimachinery.pkg.api.resource.Quantity", "").unwrap();
        assert!(quantity.contains("\n\n") && quantity.contains("<signedNumber>") && !quantity.contains('\\'));
        let reference = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";
        assert!(descriptions.of(reference, "nullable").is_none());
        assert_eq!(descriptions.of("io.k8s.api.core.v1.PodSpec", "nothing"), None);
        assert_eq!(descriptions.of("nothing", ""), None);
        let kind = descriptions.of("io.k8s.api.core.v1.Pod", "kind").unwrap();
        assert!(kind.starts_with("Kind is a string value"), "{kind}");
    }
}
