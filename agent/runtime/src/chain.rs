//! Errors as text, where they leave the process or are read by a person.

/// An error with its causes in one line. A cause that the error has written out already isn't repeated.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::chain;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open{0}")]
    struct Outer(&'static str, #[source] io::Error);

    #[test]
    fn causes_follow_once() {
        let cause = || io::Error::other("no disk");
        assert_eq!(chain(&Outer("", cause())), "cannot open: no disk");
        assert_eq!(chain(&Outer(": no disk", cause())), "cannot open: no disk");
        assert_eq!(chain(&cause()), "no disk");
    }
}
