//! Finds what is wrong with broken JSON, in the words of Go's decoder.

/// What an open list or object waits for.
#[derive(Clone, Copy)]
enum Open {
    List,
    Object,
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

const END: &str = "unexpected end of JSON input";

/// Checks that the text is one JSON value.
pub(super) fn check(text: &[u8]) -> Result<(), String> {
    let mut scanner = Scanner { bytes: text, at: 0 };
    let mut open: Vec<Open> = Vec::new();
    loop {
        // A value begins here, or an empty list or object ends.
        let ended = match scanner.next_visible()? {
            b'{' if scanner.closes(b'}') => true,
            b'{' => {
                open.push(Open::Object);
                scanner.key()?;
                false
            }
            b'[' if scanner.closes(b']') => true,
            b'[' => {
                open.push(Open::List);
                false
            }
            first => {
                scanner.scalar(first)?;
                true
            }
        };
        if ended && scanner.after_value(&mut open)? {
            return Ok(());
        }
    }
}

impl Scanner<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn next(&mut self) -> Result<u8, String> {
        let byte = self.peek().ok_or_else(|| END.to_owned())?;
        self.at += 1;
        Ok(byte)
    }

    fn next_visible(&mut self) -> Result<u8, String> {
        self.skip_space();
        self.next()
    }

    fn closes(&mut self, end: u8) -> bool {
        self.skip_space();
        let closes = self.peek() == Some(end);
        self.at += usize::from(closes);
        closes
    }

    fn key(&mut self) -> Result<(), String> {
        match self.next_visible()? {
            b'"' => self.string()?,
            other => return Err(invalid(other, "looking for beginning of object key string")),
        }
        match self.next_visible()? {
            b':' => Ok(()),
            other => Err(invalid(other, "after object key")),
        }
    }

    /// Goes on to where the next value begins; true if there is none.
    fn after_value(&mut self, open: &mut Vec<Open>) -> Result<bool, String> {
        loop {
            self.skip_space();
            match (open.last(), self.peek()) {
                (None, None) => return Ok(true),
                (None, Some(other)) => return Err(invalid(other, "after top-level value")),
                (Some(_), None) => return Err(END.to_owned()),
                (Some(Open::List), Some(b',')) => {
                    self.at += 1;
                    return Ok(false);
                }
                (Some(Open::Object), Some(b',')) => {
                    self.at += 1;
                    self.key()?;
                    return Ok(false);
                }
                (Some(Open::List), Some(b']')) | (Some(Open::Object), Some(b'}')) => {
                    self.at += 1;
                    open.pop();
                }
                (Some(Open::List), Some(other)) => return Err(invalid(other, "after array element")),
                (Some(Open::Object), Some(other)) => {
                    return Err(invalid(other, "after object key:value pair"));
                }
            }
        }
    }

    fn scalar(&mut self, first: u8) -> Result<(), String> {
        match first {
            b'"' => self.string(),
            b't' => self.literal("true"),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b'-' | b'0'..=b'9' => self.number(first),
            other => Err(invalid(other, "looking for beginning of value")),
        }
    }

    fn literal(&mut self, word: &str) -> Result<(), String> {
        for expected in word.bytes().skip(1) {
            let found = self.next()?;
            if found != expected {
                return Err(invalid(found, &format!("in literal {word} (expecting {})", quote(expected))));
            }
        }
        Ok(())
    }

    fn string(&mut self) -> Result<(), String> {
        loop {
            match self.next()? {
                b'"' => return Ok(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => {
                        for _ in 0..4 {
                            let digit = self.next()?;
                            if !digit.is_ascii_hexdigit() {
                                return Err(invalid(digit, "in \\u hexadecimal character escape"));
                            }
                        }
                    }
                    other => return Err(invalid(other, "in string escape code")),
                },
                control @ 0..b' ' => return Err(invalid(control, "in string literal")),
                _ => {}
            }
        }
    }

    fn digits(&mut self, context: &str) -> Result<(), String> {
        let first = self.next()?;
        if !first.is_ascii_digit() {
            return Err(invalid(first, context));
        }
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        Ok(())
    }

    fn number(&mut self, first: u8) -> Result<(), String> {
        let leading = if first == b'-' { self.peek() } else { Some(first) };
        self.at -= usize::from(first != b'-');
        if leading == Some(b'0') {
            self.at += 1;
        } else {
            self.digits("in numeric literal")?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits("after decimal point in numeric literal")?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits("in exponent of numeric literal")?;
        }
        Ok(())
    }
}

fn quote(byte: u8) -> String {
    match byte {
        b'\'' => r"'\''".to_owned(),
        b'"' => "'\"'".to_owned(),
        b'\n' => r"'\n'".to_owned(),
        b'\r' => r"'\r'".to_owned(),
        b'\t' => r"'\t'".to_owned(),
        b'\\' => r"'\\'".to_owned(),
        b' '..=b'~' => format!("'{}'", char::from(byte)),
        0..b' ' | 0x7f => format!("'\\x{byte:02x}'"),
        // Go takes the byte for a code point.
        0x80.. => format!("'{}'", char::from(byte)),
    }
}

fn invalid(byte: u8, context: &str) -> String {
    format!("invalid character {} {context}", quote(byte))
}
