//! What a schema wants of one value, and the canonical forms of scalars.
use std::borrow::Cow;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Number, Value};

use crate::schema::{Definition, Schema, Shape, Type};

/// What a value must be.
#[derive(Clone, Copy)]
pub(super) enum Want<'s> {
    String,
    Int32,
    Int64,
    Double,
    Bool,
    Bytes,
    Any,
    /// Any value, with its nulls and all that is in it noted: a patch.
    Plain,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    JsonSchema,
    Fields(&'s Definition),
    List(&'s Type),
    Map(&'s Type),
}

impl<'s> Want<'s> {
    pub(super) fn of(schema: &'s Schema, ty: &Type) -> Self
    where
        Self: 's,
    {
        match ty {
            Type::String => Self::String,
            Type::Int32 => Self::Int32,
            Type::Int64 => Self::Int64,
            Type::Double => Self::Double,
            Type::Bool => Self::Bool,
            Type::Bytes => Self::Bytes,
            Type::Object => Self::Any,
            Type::Ref(id) => {
                let definition = schema.get(*id);
                match definition.shape {
                    Shape::Object => Self::Fields(definition),
                    Shape::Time => Self::Time,
                    Shape::MicroTime => Self::MicroTime,
                    Shape::Quantity => Self::Quantity,
                    Shape::IntOrString => Self::IntOrString,
                    Shape::Raw | Shape::Json => Self::Any,
                    Shape::JsonSchema => Self::JsonSchema,
                }
            }
            Type::List(_) | Type::Map(_) => Self::Any,
        }
    }

    /// Like [`Self::of`] for a type that lives as long as the schema.
    pub(super) fn within(schema: &'s Schema, ty: &'s Type) -> Self {
        match ty {
            Type::List(item) => Self::List(item),
            Type::Map(value) => Self::Map(value),
            Type::Ref(_)
            | Type::String
            | Type::Int32
            | Type::Int64
            | Type::Double
            | Type::Bool
            | Type::Bytes
            | Type::Object => Self::of(schema, ty),
        }
    }

    /// What Go makes of null in a list or a map.
    pub(super) fn zero(self) -> Value {
        match self {
            Self::String | Self::Bytes => Value::String(String::new()),
            Self::Int32 | Self::Int64 | Self::Double | Self::IntOrString => Value::from(0),
            Self::Bool => Value::Bool(false),
            Self::Quantity => Value::from("0"),
            Self::Fields(_) => Value::Object(Map::new()),
            Self::Any
            | Self::Plain
            | Self::Time
            | Self::MicroTime
            | Self::JsonSchema
            | Self::List(_)
            | Self::Map(_) => Value::Null,
        }
    }

    pub(super) fn go_type(self, schema: &Schema) -> String {
        match self {
            Self::String => "string".to_owned(),
            Self::Int32 => "int32".to_owned(),
            Self::Int64 => "int64".to_owned(),
            Self::Double => "float64".to_owned(),
            Self::Bool => "bool".to_owned(),
            Self::Bytes => "[]uint8".to_owned(),
            Self::Any | Self::Plain => "interface {}".to_owned(),
            Self::Time => "v1.Time".to_owned(),
            Self::MicroTime => "v1.MicroTime".to_owned(),
            Self::Quantity => "resource.Quantity".to_owned(),
            Self::IntOrString => "intstr.IntOrString".to_owned(),
            Self::JsonSchema => "v1.JSONSchemaProps".to_owned(),
            Self::Fields(definition) => definition.go_type(),
            Self::List(item) => format!("[]{}", go_type(schema, item)),
            Self::Map(value) => format!("map[string]{}", go_type(schema, value)),
        }
    }
}

pub(super) fn go_type(schema: &Schema, ty: &Type) -> String {
    match ty {
        Type::List(item) => format!("[]{}", go_type(schema, item)),
        Type::Map(value) => format!("map[string]{}", go_type(schema, value)),
        Type::Ref(id) => schema.get(*id).go_type(),
        Type::String | Type::Int32 | Type::Int64 | Type::Double | Type::Bool | Type::Bytes | Type::Object => {
            Want::of(schema, ty).go_type(schema)
        }
    }
}

/// A scalar, as any format may bring it.
pub(super) enum Scalar<'a> {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Str(Cow<'a, str>),
}

impl Scalar<'_> {
    pub(super) fn go_kind(&self) -> &'static str {
        match self {
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::Uint(_) | Self::Float(_) => "number",
            Self::Str(_) => "string",
        }
    }

    pub(super) fn text(&self) -> String {
        match self {
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Uint(value) => value.to_string(),
            Self::Float(value) => Value::from(*value).to_string(),
            Self::Str(value) => value.to_string(),
        }
    }

    pub(super) fn into_value(self) -> Value {
        match self {
            Self::Bool(value) => Value::Bool(value),
            Self::Int(value) => Value::from(value),
            Self::Uint(value) => Value::from(value),
            Self::Float(value) => Number::from_f64(value).map_or(Value::Null, Value::Number),
            Self::Str(value) => Value::String(value.into_owned()),
        }
    }
}

/// Go writes a float without fraction like an integer.
pub(super) fn whole_or_float(number: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if number.fract() == 0.0 && number.abs() < EXACT {
        #[expect(clippy::cast_possible_truncation, reason = "whole and within the exact range of f64")]
        return Value::from(number as i64);
    }
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}

pub(super) fn canonical_base64(text: &str) -> Result<String, String> {
    let packed: Cow<'_, str> = if text.contains(['\n', '\r']) {
        Cow::Owned(text.chars().filter(|c| !matches!(c, '\n' | '\r')).collect())
    } else {
        Cow::Borrowed(text)
    };
    match BASE64_STANDARD.decode(packed.as_bytes()) {
        Ok(_) => Ok(packed.into_owned()),
        Err(error) => {
            let at = match error {
                base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => at,
                base64::DecodeError::InvalidLength(_) | base64::DecodeError::InvalidPadding => {
                    packed.trim_end_matches('=').len()
                }
            };
            Err(format!("illegal base64 data at input byte {at}"))
        }
    }
}
