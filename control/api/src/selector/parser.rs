//! The text form of label selectors.
use std::{iter::Peekable, str::Chars};

use super::{Operator, Requirement, SelectorError};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Symbol(&'static str),
    End,
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Word(word) => word,
            Self::Symbol(symbol) => symbol,
            Self::End => "",
        }
    }

    fn is(&self, text: &str) -> bool {
        *self != Self::End && self.text() == text
    }
}

/// The longer of two symbols comes first.
const SYMBOLS: [&str; 9] = ["==", "!=", "=", "!", "(", ")", ",", ">", "<"];

struct Lexer<'a> {
    chars: Peekable<Chars<'a>>,
    peeked: Option<Token>,
}

impl Lexer<'_> {
    fn peek(&mut self) -> &Token {
        let token = self.next();
        self.peeked.insert(token)
    }

    fn next(&mut self) -> Token {
        if let Some(token) = self.peeked.take() {
            return token;
        }
        while self.chars.next_if(|c| matches!(c, ' ' | '\t' | '\r' | '\n')).is_some() {}
        let Some(first) = self.chars.next() else { return Token::End };
        let is_symbol = |c: char| "=!(),><".contains(c);
        if is_symbol(first) {
            let two = first != '=' && first != '!' || self.chars.next_if_eq(&'=').is_none();
            let text = if two { first.to_string() } else { format!("{first}=") };
            let known = SYMBOLS.into_iter().find(|symbol| *symbol == text);
            return Token::Symbol(known.expect("every symbol character is a symbol"));
        }
        let mut word = first.to_string();
        while let Some(c) = self.chars.next_if(|c| !is_symbol(*c) && !matches!(c, ' ' | '\t' | '\r' | '\n')) {
            word.push(c);
        }
        Token::Word(word)
    }
}

fn unexpected(found: &Token, expected: &str) -> SelectorError {
    SelectorError::Syntax(format!("found '{}', expected: {expected}", found.text()))
}

/// Parses requirements separated by commas.
pub(super) fn parse(text: &str) -> Result<Vec<Requirement>, SelectorError> {
    let mut lexer = Lexer { chars: text.chars().peekable(), peeked: None };
    let mut requirements = Vec::new();
    if *lexer.peek() == Token::End {
        return Ok(requirements);
    }
    loop {
        requirements.push(requirement(&mut lexer)?);
        let token = lexer.next();
        if token == Token::End {
            return Ok(requirements);
        }
        if !token.is(",") {
            return Err(unexpected(&token, "',' or 'end of string'"));
        }
        let token = lexer.peek();
        if !matches!(token, Token::Word(_)) && !token.is("!") {
            return Err(unexpected(token, "identifier after ','"));
        }
    }
}

fn requirement(lexer: &mut Lexer<'_>) -> Result<Requirement, SelectorError> {
    let absent = lexer.peek().is("!");
    if absent {
        lexer.next();
    }
    let key = match lexer.next() {
        Token::Word(word) => word,
        token @ (Token::Symbol(_) | Token::End) => return Err(unexpected(&token, "identifier")),
    };
    let ends = |token: &Token| *token == Token::End || token.is(",");
    if ends(lexer.peek()) {
        let operator = if absent { Operator::DoesNotExist } else { Operator::Exists };
        return Requirement::new(key, operator, Vec::new());
    }
    if absent {
        return Err(unexpected(lexer.peek(), "',' or 'end of string'"));
    }
    let operator = lexer.next();
    match operator.text() {
        "=" | "==" => {
            let value = exact_value(lexer)?;
            Requirement::new(key, Operator::In, vec![value])
        }
        "!=" => {
            let value = exact_value(lexer)?;
            Requirement::new(key, Operator::NotIn, vec![value])
        }
        ">" => {
            let value = exact_value(lexer)?;
            Requirement::new(key, Operator::GreaterThan, vec![value])
        }
        "<" => {
            let value = exact_value(lexer)?;
            Requirement::new(key, Operator::LessThan, vec![value])
        }
        "in" => {
            let values = values(lexer)?;
            Requirement::new(key, Operator::In, values)
        }
        "notin" => {
            let values = values(lexer)?;
            Requirement::new(key, Operator::NotIn, values)
        }
        _ => Err(unexpected(&operator, "in, notin, =, ==, !=, gt, lt")),
    }
}

/// The value behind `=`; none means the empty one.
fn exact_value(lexer: &mut Lexer<'_>) -> Result<String, SelectorError> {
    match lexer.peek() {
        Token::End => return Ok(String::new()),
        token if token.is(",") => return Ok(String::new()),
        Token::Word(_) | Token::Symbol(_) => {}
    }
    match lexer.next() {
        Token::Word(word) => Ok(word),
        token @ (Token::Symbol(_) | Token::End) => Err(unexpected(&token, "identifier")),
    }
}

/// Values in parentheses; one left out is the empty one.
fn values(lexer: &mut Lexer<'_>) -> Result<Vec<String>, SelectorError> {
    let open = lexer.next();
    if !open.is("(") {
        return Err(unexpected(&open, "'('"));
    }
    let mut values = Vec::new();
    loop {
        let value =
            if let Token::Word(_) = lexer.peek() { lexer.next().text().to_owned() } else { String::new() };
        let given = !value.is_empty();
        values.push(value);
        let token = lexer.next();
        if token.is(")") {
            return Ok(values);
        }
        if !token.is(",") {
            return Err(unexpected(&token, if given { "',' or ')'" } else { "',', ')' or identifier" }));
        }
    }
}
