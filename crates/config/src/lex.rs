//! Tokens of the configuration grammar.
//!
//! Names are `[a-z][._0-9a-z]*`, numbers start with a digit, strings stand in ' or " and end on their line, `#` starts a
//! comment up to the end of the line. Escapes in strings: `\" \' \\ \a \b \f \n \r \t \v \xHH \OOO`.

use std::str::Chars;

/// One token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Ident(String),
    Number(String),
    String(String),
    Comma,
    Open,
    Close,
    Assign,
    Add,
    Semicolon,
    /// End of a line; a comment belongs to it.
    Newline,
    End,
}

impl Token {
    /// What messages call it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Token::Ident(name) => format!("`{name}'"),
            Token::Number(text) => format!("number {text}"),
            Token::String(text) => format!("string \"{}\"", text.escape_debug()),
            Token::Comma => "`,'".into(),
            Token::Open => "`['".into(),
            Token::Close => "`]'".into(),
            Token::Assign => "`='".into(),
            Token::Add => "`+='".into(),
            Token::Semicolon => "`;'".into(),
            Token::Newline => "the end of the line".into(),
            Token::End => "the end of the text".into(),
        }
    }
}

/// A token and where it starts, both from 1.
#[derive(Clone, Debug)]
pub(crate) struct Spanned {
    pub token: Token,
    pub line: u32,
    pub column: u32,
}

/// What is wrong with the characters at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LexError {
    pub line: u32,
    pub column: u32,
    pub message: String,
}

pub(crate) struct Lexer<'a> {
    rest: Chars<'a>,
    line: u32,
    column: u32,
}

impl<'a> Lexer<'a> {
    pub(crate) fn new(text: &'a str) -> Lexer<'a> {
        Lexer {
            rest: text.chars(),
            line: 1,
            column: 1,
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    fn bump(&mut self) -> Option<char> {
        let c = self.rest.next()?;
        if c == '\n' {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += 1;
        }
        Some(c)
    }

    fn take_while(&mut self, first: char, wanted: impl Fn(char) -> bool) -> String {
        let mut text = String::from(first);
        while let Some(c) = self.peek().filter(|c| wanted(*c)) {
            text.push(c);
            self.bump();
        }
        text
    }

    /// Drops the rest of the line, up to but without its end.
    pub(crate) fn skip_line(&mut self) {
        while self.peek().is_some_and(|c| c != '\n') {
            self.bump();
        }
    }

    /// The next token. After an error the lexer stands behind the offending characters.
    pub(crate) fn next(&mut self) -> Result<Spanned, LexError> {
        // A carriage return is white space, so that files from other systems can be read.
        while self.peek().is_some_and(|c| matches!(c, ' ' | '\t' | '\r')) {
            self.bump();
        }
        let (line, column) = (self.line, self.column);
        let token = self.token().map_err(|message| LexError {
            line,
            column,
            message,
        })?;
        Ok(Spanned {
            token,
            line,
            column,
        })
    }

    fn token(&mut self) -> Result<Token, String> {
        let Some(c) = self.bump() else {
            return Ok(Token::End);
        };
        Ok(match c {
            ',' => Token::Comma,
            '[' => Token::Open,
            ']' => Token::Close,
            '=' => Token::Assign,
            ';' => Token::Semicolon,
            '\n' => Token::Newline,
            '#' => {
                self.skip_line();
                if self.bump().is_none() {
                    return Ok(Token::End);
                }
                Token::Newline
            }
            '+' if self.peek() == Some('=') => {
                self.bump();
                Token::Add
            }
            'a'..='z' => {
                Token::Ident(self.take_while(c, |c| matches!(c, 'a'..='z' | '0'..='9' | '_' | '.')))
            }
            '0'..='9' => self.number(c)?,
            '\'' | '"' => Token::String(self.string(c)?),
            '+' | '-' | '.' | '(' | ')' | ':' | '{' | '}' | '%' => {
                return Err(format!(
                    "`{c}' has no meaning here; Python code is not understood, only NAME=VALUE; put a text in quotes"
                ));
            }
            'A'..='Z' | '_' => {
                let word = self.take_while(c, |c| c.is_ascii_alphanumeric() || c == '_');
                return Err(format!(
                    "`{word}' is no name (names are in lower case) and no value (put a text in quotes)"
                ));
            }
            _ => {
                return Err(format!(
                    "`{}' has no meaning here; put a text in quotes",
                    c.escape_debug()
                ));
            }
        })
    }

    fn number(&mut self, first: char) -> Result<Token, String> {
        let text = self.take_while(first, |c| c.is_ascii_alphanumeric() || c == '_');
        if text
            .chars()
            .all(|c| matches!(c, '0'..='9' | 'a'..='f' | 'x'))
        {
            Ok(Token::Number(text))
        } else {
            Err(format!(
                "`{text}' is no number; write it without a unit, or put a text in quotes"
            ))
        }
    }

    fn string(&mut self, quote: char) -> Result<String, String> {
        let mut text = String::new();
        loop {
            match self.peek() {
                None | Some('\n') => {
                    return Err(format!("the string is not closed with {quote} on its line"));
                }
                Some('\0') => {
                    self.skip_line();
                    return Err("the string contains a NUL character".into());
                }
                Some(_) => {}
            }
            match self.bump() {
                Some('\\') => match self.escape() {
                    Ok(c) => text.push(c),
                    Err(message) => {
                        // The rest of the string would be read as garbage.
                        self.skip_line();
                        return Err(message);
                    }
                },
                Some(c) if c == quote => return Ok(text),
                Some(c) => text.push(c),
                None => {}
            }
        }
    }

    fn escape(&mut self) -> Result<char, String> {
        let code = match self.peek() {
            None | Some('\n') => return Err("the string ends in a backslash".into()),
            Some('x') => {
                self.bump();
                self.digits(16, 2, 2)?
            }
            Some('0'..='7') => self.digits(8, 1, 3)?,
            Some(c) => {
                self.bump();
                return Ok(match c {
                    '"' | '\'' | '\\' => c,
                    'a' => '\x07',
                    'b' => '\x08',
                    'f' => '\x0c',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    'v' => '\x0b',
                    _ => {
                        return Err(format!(
                            "`\\{}' is no escape; write \\\\ for a backslash",
                            c.escape_debug()
                        ));
                    }
                });
            }
        };
        match code {
            0 => Err("an escape stands for a NUL character, which no setting can hold".into()),
            1..=0x7f => Ok(char::from(code as u8)),
            _ => Err("an escape stands for a byte above 0x7f; write the character itself".into()),
        }
    }

    fn digits(&mut self, radix: u32, min: usize, max: usize) -> Result<u32, String> {
        let mut value = 0;
        let mut count = 0;
        while count < max
            && let Some(digit) = self.peek().and_then(|c| c.to_digit(radix))
        {
            value = value * radix + digit;
            count += 1;
            self.bump();
        }
        if count < min {
            return Err("\\x needs two hexadecimal digits".into());
        }
        Ok(value)
    }
}
