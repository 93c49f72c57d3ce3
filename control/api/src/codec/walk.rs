//! One pass over a value of any format: checks it against the schema, drops what is unknown, canonicalises the rest.
use std::{borrow::Cow, fmt};

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::want::{Scalar, Want, canonical_base64, whole_or_float};
use crate::{
    quantity::Quantity,
    schema::{Definition, DefinitionId, Field, Schema, Type},
    timestamp,
};

/// Upstream stops counting unknown and duplicate fields here too.
const MAX_PROBLEMS: usize = 100;

const CONDITION: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Condition";
/// Go's zero time: what every Go client reads where upstream's API server writes null. Clients of other languages take the whole object for
/// broken if this field, which its schema requires, is null or absent.
const NEVER: &str = "0001-01-01T00:00:00Z";

const SCHEMA_PROPS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

/// One step of the way from the root to a value.
enum Step<'s> {
    Field(&'s str),
    Index(usize),
    Key(String),
}

/// State of a pass.
pub(super) struct Walk<'s> {
    schema: &'s Schema,
    /// Whether to note unknown and duplicate fields.
    report: bool,
    path: Vec<Step<'s>>,
    problems: Vec<String>,
    /// The first value of a wrong type; ends the pass.
    mistyped: Option<String>,
}

impl<'s> Walk<'s> {
    pub(super) fn new(schema: &'s Schema, report: bool) -> Self {
        Self { schema, report, path: Vec::new(), problems: Vec::new(), mistyped: None }
    }

    /// The seed that reads a whole object.
    pub(super) fn root(&mut self, definition: DefinitionId) -> Root<'_, 's> {
        Root { walk: self, definition }
    }

    /// Reads any value and notes duplicate fields.
    pub(super) fn plain<'de, D: Deserializer<'de>>(&mut self, deserializer: D) -> Result<Value, D::Error> {
        let seed = Seed { walk: self, want: Want::Plain, owner: None };
        Ok(seed.deserialize(deserializer)?.unwrap_or(Value::Null))
    }

    /// Unknown and duplicate fields, in upstream's words.
    pub(super) fn into_problems(self) -> Vec<String> {
        self.problems
    }

    /// The value of a wrong type that ended the pass, in upstream's words.
    pub(super) fn take_mistyped(&mut self) -> Option<String> {
        self.mistyped.take()
    }

    /// Whether the pass ended where no type can be known: at the root, its `apiVersion` or its `kind`.
    pub(super) fn in_type_name(&self) -> bool {
        matches!(self.path.as_slice(), [] | [Step::Field("apiVersion" | "kind")])
    }

    /// The path of `last` under the current one, as in `spec.containers[0].name`.
    fn path_to(&self, last: &str) -> String {
        let mut path = String::new();
        for step in &self.path {
            match step {
                Step::Index(at) => path.push_str(&format!("[{at}]")),
                Step::Field(name) => push_name(&mut path, name),
                Step::Key(key) => push_name(&mut path, key),
            }
        }
        push_name(&mut path, last);
        path
    }

    fn problem(&mut self, what: &str, name: &str) {
        if self.report && self.problems.len() < MAX_PROBLEMS {
            let problem = format!("{what} field \"{}\"", self.path_to(name));
            self.problems.push(problem);
        }
    }

    /// Go's message for a JSON value that doesn't fit a Go type.
    fn misfit(&self, value: &str, owner: Option<&Definition>, go_type: &str) -> String {
        let fields: Vec<&str> = self
            .path
            .iter()
            .filter_map(|step| match step {
                Step::Field(name) => Some(*name),
                Step::Index(_) | Step::Key(_) => None,
            })
            .collect();
        match owner {
            _ if self.path.is_empty() => {
                let meta = r#"struct { APIVersion string "json:\"apiVersion,omitempty\""; Kind string "json:\"kind,omitempty\"" }"#;
                format!("json: cannot unmarshal {value} into Go value of type {meta}")
            }
            Some(owner) => {
                // The type is read by itself first, into a struct without a name.
                let owner = if self.in_type_name() { "" } else { owner.go_name() };
                let path = fields.join(".");
                format!(
                    "json: cannot unmarshal {value} into Go struct field {owner}.{path} of type {go_type}"
                )
            }
            None => format!("json: cannot unmarshal {value} into Go value of type {go_type}"),
        }
    }
}

fn push_name(path: &mut String, name: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(name);
}

/// Reads a whole object.
pub(super) struct Root<'w, 's> {
    walk: &'w mut Walk<'s>,
    definition: DefinitionId,
}

impl<'de> DeserializeSeed<'de> for Root<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let ty = Type::Ref(self.definition);
        let seed = Seed { want: Want::of(self.walk.schema, &ty), walk: self.walk, owner: None };
        Ok(seed.deserialize(deserializer)?.unwrap_or_else(|| Value::Object(Map::new())))
    }
}

/// Reads one value; `None` is null, which means absent.
struct Seed<'w, 's> {
    walk: &'w mut Walk<'s>,
    want: Want<'s>,
    /// The definition whose field leads here.
    owner: Option<&'s Definition>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'s> Seed<'_, 's> {
    fn stop<E: de::Error>(self, message: String) -> E {
        self.walk.mistyped = Some(message);
        E::custom("a value of the wrong type")
    }

    fn mismatch<E: de::Error>(self, value: &str) -> E {
        let message = match self.want {
            // These read themselves in Go, without the context of the field.
            Want::Time | Want::MicroTime => {
                format!("json: cannot unmarshal {value} into Go value of type string")
            }
            Want::Quantity => crate::quantity::QuantityError::Format.to_string(),
            Want::IntOrString => format!("json: cannot unmarshal {value} into Go value of type int32"),
            want @ (Want::String
            | Want::Int32
            | Want::Int64
            | Want::Double
            | Want::Bool
            | Want::Bytes
            | Want::Any
            | Want::Plain
            | Want::JsonSchema
            | Want::Fields(_)
            | Want::List(_)
            | Want::Map(_)) => self.walk.misfit(value, self.owner, &want.go_type(self.walk.schema)),
        };
        self.stop(message)
    }

    fn scalar<E: de::Error>(self, scalar: Scalar<'_>) -> Result<Option<Value>, E> {
        let fits_i32 = |number: i64| i32::try_from(number).is_ok();
        let value = match (self.want, scalar) {
            (Want::Any | Want::Plain | Want::JsonSchema, scalar) => scalar.into_value(),
            (Want::String | Want::IntOrString, Scalar::Str(text)) => Value::String(text.into_owned()),
            (Want::Bool, Scalar::Bool(value)) => Value::Bool(value),
            (Want::Int32 | Want::IntOrString, Scalar::Int(number)) if fits_i32(number) => Value::from(number),
            (Want::Int64, Scalar::Int(number)) => Value::from(number),
            (Want::Double, Scalar::Float(number)) => whole_or_float(number),
            (Want::Double, scalar @ (Scalar::Int(_) | Scalar::Uint(_))) => scalar.into_value(),
            (Want::Quantity, scalar) => match scalar.text().trim().parse::<Quantity>() {
                Ok(quantity) => Value::String(quantity.to_string()),
                Err(error) => return Err(self.stop(error.to_string())),
            },
            (Want::Time | Want::MicroTime, Scalar::Str(text)) => match timestamp::parse(&text) {
                Ok(time) if matches!(self.want, Want::Time) => Value::String(timestamp::seconds(time)),
                Ok(time) => Value::String(timestamp::micros(time)),
                Err(error) => return Err(self.stop(error.to_string())),
            },
            (Want::Bytes, Scalar::Str(text)) => match canonical_base64(&text) {
                Ok(text) => Value::String(text),
                Err(message) => return Err(self.stop(message)),
            },
            (
                Want::Int32 | Want::Int64 | Want::IntOrString,
                scalar @ (Scalar::Int(_) | Scalar::Uint(_) | Scalar::Float(_)),
            ) => {
                return Err(self.mismatch(&format!("number {}", scalar.text())));
            }
            (_, scalar) => return Err(self.mismatch(scalar.go_kind())),
        };
        Ok(Some(value))
    }

    fn object<'de, A: MapAccess<'de>>(
        self,
        definition: &'s Definition,
        mut access: A,
    ) -> Result<Option<Value>, A::Error> {
        let walk = self.walk;
        let mut object = Map::new();
        // Fields that were null; they count as seen.
        let mut nulls: Vec<&str> = Vec::new();
        while let Some(key) = access.next_key_seed(Key(definition))? {
            let field = match key {
                Named::Field(field) => field,
                Named::Unknown(name) => {
                    walk.problem("unknown", &name);
                    access.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            let name = field.name.as_ref();
            if object.contains_key(name) || nulls.contains(&name) {
                walk.problem("duplicate", name);
            }
            walk.path.push(Step::Field(name));
            let want = Want::within(walk.schema, &field.ty);
            let value = access.next_value_seed(Seed { walk, want, owner: Some(definition) })?;
            walk.path.pop();
            match value {
                Some(value) => drop(object.insert(name.to_owned(), value)),
                None => nulls.push(name),
            }
        }
        if definition.name == CONDITION {
            object.entry("lastTransitionTime").or_insert_with(|| NEVER.into());
        }
        Ok(Some(Value::Object(object)))
    }

    fn map<'de, A: MapAccess<'de>>(self, want: Want<'s>, mut access: A) -> Result<Option<Value>, A::Error> {
        let Self { walk, owner, .. } = self;
        // Only what has fields of its own needs its key on the path.
        let deep =
            matches!(want, Want::Plain | Want::Fields(_) | Want::List(_) | Want::Map(_) | Want::JsonSchema);
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                walk.problem("duplicate", &key);
            }
            if deep {
                walk.path.push(Step::Key(key.clone()));
            }
            let value = access.next_value_seed(Seed { walk, want, owner })?;
            if deep {
                walk.path.pop();
            }
            map.insert(key, value.unwrap_or_else(|| want.zero()));
        }
        Ok(Some(Value::Object(map)))
    }
}

impl<'de, 's> Visitor<'de> for Seed<'_, 's> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Self::Value, E> {
        self.scalar(Scalar::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        self.scalar(Scalar::Int(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        self.scalar(i64::try_from(value).map_or(Scalar::Uint(value), Scalar::Int))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
        self.scalar(Scalar::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
        self.scalar(Scalar::Str(Cow::Borrowed(value)))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Self::Value, E> {
        self.scalar(Scalar::Str(Cow::Owned(value)))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let want = match self.want {
            Want::List(item) => Want::within(self.walk.schema, item),
            Want::JsonSchema => Want::JsonSchema,
            Want::Any => Want::Any,
            Want::Plain => Want::Plain,
            Want::Bytes
            | Want::String
            | Want::Int32
            | Want::Int64
            | Want::Double
            | Want::Bool
            | Want::Time
            | Want::MicroTime
            | Want::Quantity
            | Want::IntOrString
            | Want::Fields(_)
            | Want::Map(_) => return Err(self.mismatch("array")),
        };
        let Self { walk, owner, .. } = self;
        let mut list = Vec::with_capacity(access.size_hint().unwrap_or_default().min(64));
        loop {
            walk.path.push(Step::Index(list.len()));
            let Some(value) = access.next_element_seed(Seed { walk, want, owner })? else { break };
            walk.path.pop();
            list.push(value.unwrap_or_else(|| want.zero()));
        }
        walk.path.pop();
        Ok(Some(Value::Array(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<Self::Value, A::Error> {
        match self.want {
            Want::Fields(definition) => self.object(definition, access),
            Want::Map(item) => {
                let want = Want::within(self.walk.schema, item);
                self.map(want, access)
            }
            Want::Plain => self.map(Want::Plain, access),
            Want::Any => {
                let value =
                    <Value as de::Deserialize>::deserialize(de::value::MapAccessDeserializer::new(access))?;
                Ok(Some(value))
            }
            Want::JsonSchema => {
                let schema = self.walk.schema;
                let id = schema.by_name(SCHEMA_PROPS).expect("the facts table has the schema of CRD schemas");
                self.object(schema.get(id), access)
            }
            Want::Bytes
            | Want::String
            | Want::Int32
            | Want::Int64
            | Want::Double
            | Want::Bool
            | Want::Time
            | Want::MicroTime
            | Want::Quantity
            | Want::IntOrString
            | Want::List(_) => Err(self.mismatch("object")),
        }
    }
}

/// A field's name; finds the field without copying the name.
struct Key<'s>(&'s Definition);

enum Named<'s> {
    Field(&'s Field),
    Unknown(String),
}

impl<'de, 's> DeserializeSeed<'de> for Key<'s> {
    type Value = Named<'s>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'s> Visitor<'_> for Key<'s> {
    type Value = Named<'s>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.field(name).map_or_else(|| Named::Unknown(name.to_owned()), Named::Field))
    }
}
