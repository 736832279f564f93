//! The types of functions, to be compared by programs. [`super::text`] writes them for people.

use std::fmt;

use super::{Btf, TypeKind, TypeRecord, CHAIN};
use crate::Error;

/// Most parameters of a function. Linux has none with more than twenty or so.
const PARAMETERS_MAX: usize = 64;

/// The type of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prototype {
    /// The type of its result.
    pub returns: Type,
    /// The types of its parameters in order. That of `...` is [`Type::Other`].
    pub parameters: Vec<Type>,
}

/// A type as a prototype names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// `void`.
    Void,
    /// A type with a name. The kind of one that is only declared is that of its definition.
    Named(TypeKind, String),
    /// A pointer to it.
    Pointer(Box<Type>),
    /// Anything else: with a qualifier or a tag, an array, a function, or without a name. Equal to no named type.
    Other,
}

impl Type {
    /// `struct NAME *`.
    #[must_use]
    pub fn pointer_to_struct(name: &str) -> Type {
        Type::Pointer(Box::new(Type::Named(TypeKind::Struct, name.to_owned())))
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Type::Void => f.write_str("void"),
            Type::Named(TypeKind::Struct, name) => write!(f, "struct {name}"),
            Type::Named(TypeKind::Union, name) => write!(f, "union {name}"),
            Type::Named(TypeKind::Enum | TypeKind::Enum64, name) => write!(f, "enum {name}"),
            Type::Named(_, name) => f.write_str(name),
            Type::Pointer(to) if matches!(**to, Type::Pointer(_)) => write!(f, "{to}*"),
            Type::Pointer(to) => write!(f, "{to} *"),
            Type::Other => f.write_str("another type"),
        }
    }
}

impl fmt::Display for Prototype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameters: Vec<String> = self.parameters.iter().map(Type::to_string).collect();
        let parameters = match parameters.is_empty() {
            true => "void".to_owned(),
            false => parameters.join(", "),
        };
        write!(f, "{} ({parameters})", self.returns)
    }
}

impl Btf {
    /// The type of the only function called `name`.
    ///
    /// # Errors
    /// [`Error::Missing`]: there is no such function. [`Error::Odd`]: there are several, or its type is damaged.
    pub fn prototype(&self, name: &str) -> Result<Prototype, Error> {
        let records = self.named(name).filter_map(|id| self.record(id));
        let mut functions = records.filter(|r| r.kind == TypeKind::Func);
        match (functions.next(), functions.next()) {
            (None, _) => Err(Error::Missing(format!("function {name} in its BTF"))),
            (Some(_), Some(_)) => Err(Error::Odd(format!("BTF: several functions {name}"))),
            (Some(function), None) => self
                .prototype_of(&function)
                .ok_or_else(|| Error::Odd(format!("BTF: the type of function {name}"))),
        }
    }

    fn prototype_of(&self, function: &TypeRecord<'_>) -> Option<Prototype> {
        let own = self.record(function.value)?;
        if own.kind != TypeKind::FuncProto || own.parts > PARAMETERS_MAX {
            return None;
        }
        let parameter = |i: usize| {
            let (name, id) = (own.word(2 * i)?, own.word(2 * i + 1)?);
            // Both are zero for `...`.
            Some(match (name, id) {
                (0, 0) => Type::Other,
                _ => self.type_of(id),
            })
        };
        Some(Prototype {
            returns: self.type_of(own.value),
            parameters: (0..own.parts).map(parameter).collect::<Option<_>>()?,
        })
    }

    fn type_of(&self, mut id: u32) -> Type {
        let mut pointers = 0;
        while let Some(pointer) = self.record(id).filter(|r| r.kind == TypeKind::Ptr) {
            if pointers == CHAIN {
                return Type::Other;
            }
            (id, pointers) = (pointer.value, pointers + 1);
        }
        let base = match self.record(id) {
            None if id == 0 => Type::Void,
            Some(r) if r.name != 0 && names_a_type(r.kind) => {
                let kind = match r.kind {
                    TypeKind::Fwd if r.flag => TypeKind::Union,
                    TypeKind::Fwd => TypeKind::Struct,
                    kind => kind,
                };
                Type::Named(kind, self.name(r.name))
            }
            _ => Type::Other,
        };
        (0..pointers).fold(base, |to, _| Type::Pointer(Box::new(to)))
    }
}

fn names_a_type(kind: TypeKind) -> bool {
    use TypeKind::{Enum, Enum64, Float, Fwd, Int, Struct, Typedef, Union};
    matches!(
        kind,
        Int | Float | Typedef | Struct | Union | Enum | Enum64 | Fwd
    )
}

#[cfg(test)]
mod tests {
    use super::super::blob::Blob;
    use super::*;

    /// A blob with a function `f` that has this prototype, as `make` says.
    fn with(make: impl Fn(&mut Blob) -> u32) -> Btf {
        let mut b = Blob::new();
        let proto = make(&mut b);
        b.refer("f", TypeKind::Func, proto);
        Btf::new(b.bytes()).unwrap()
    }

    fn said(make: impl Fn(&mut Blob) -> u32) -> String {
        with(make).prototype("f").unwrap().to_string()
    }

    #[test]
    fn a_prototype_names_the_types_of_the_result_and_of_the_parameters() {
        let found = with(|b| {
            let int = b.int("int", 4);
            let pid = b.refer("pid_t", TypeKind::Typedef, int);
            // Only declared, as in a file that never looks inside.
            let space = b.refer("pid_namespace", TypeKind::Fwd, 0);
            let space = b.refer("", TypeKind::Ptr, space);
            let task = b.structure("task_struct", 8, &[("pid", int, 0)]);
            let task = b.refer("", TypeKind::Ptr, task);
            b.proto(task, &[("nr", pid), ("ns", space)])
        });
        let prototype = found.prototype("f").unwrap();
        let expected = Prototype {
            returns: Type::pointer_to_struct("task_struct"),
            parameters: vec![
                Type::Named(TypeKind::Typedef, "pid_t".into()),
                Type::pointer_to_struct("pid_namespace"),
            ],
        };
        assert_eq!(prototype, expected);
        assert_eq!(
            prototype.to_string(),
            "struct task_struct * (pid_t, struct pid_namespace *)"
        );
    }

    #[test]
    fn nothing_is_void_and_a_function_without_parameters_has_none() {
        assert_eq!(said(|b| b.proto(0, &[])), "void (void)");
        let pointer = |b: &mut Blob| {
            let once = b.refer("", TypeKind::Ptr, 0);
            let twice = b.refer("", TypeKind::Ptr, once);
            b.proto(once, &[("p", twice)])
        };
        assert_eq!(said(pointer), "void * (void **)");
    }

    #[test]
    fn what_is_qualified_tagged_nameless_or_variable_is_no_named_type() {
        for kind in [
            TypeKind::Const,
            TypeKind::Volatile,
            TypeKind::Restrict,
            TypeKind::TypeTag,
            TypeKind::Array,
        ] {
            let found = with(|b| {
                let int = b.int("int", 4);
                let other = match kind {
                    TypeKind::Array => b.array(int, 4),
                    TypeKind::TypeTag => b.refer("user", kind, int),
                    _ => b.refer("", kind, int),
                };
                let pointer = b.refer("", TypeKind::Ptr, other);
                b.proto(other, &[("p", pointer), ("", 0)])
            });
            let prototype = found.prototype("f").unwrap();
            assert_eq!(prototype.returns, Type::Other, "{kind:?}");
            let pointer = Type::Pointer(Box::new(Type::Other));
            assert_eq!(prototype.parameters, [pointer, Type::Other], "{kind:?}");
        }
    }

    #[test]
    fn a_function_that_is_missing_twofold_or_damaged_has_no_prototype() {
        let mut b = Blob::new();
        let int = b.int("int", 4);
        let proto = b.proto(int, &[]);
        for name in ["twice", "twice"] {
            b.refer(name, TypeKind::Func, proto);
        }
        b.refer("damaged", TypeKind::Func, int);
        b.refer("nowhere", TypeKind::Func, 999);
        let many = vec![("p", int); PARAMETERS_MAX + 1];
        let many = b.proto(int, &many);
        b.refer("many", TypeKind::Func, many);
        // A type of this name is no function.
        b.refer("typedef", TypeKind::Typedef, int);
        let btf = Btf::new(b.bytes()).unwrap();
        for name in ["twice", "damaged", "nowhere", "many"] {
            let error = btf.prototype(name).unwrap_err();
            assert!(matches!(error, Error::Odd(_)), "{name}: {error}");
        }
        for name in ["typedef", "absent"] {
            let error = btf.prototype(name).unwrap_err();
            assert!(matches!(error, Error::Missing(_)), "{name}: {error}");
        }
    }

    #[test]
    fn pointers_that_never_end_are_another_type() {
        let found = with(|b| {
            // The third type points at itself: int, pointer, function.
            let int = b.int("int", 4);
            let own = b.refer("", TypeKind::Ptr, int + 1);
            b.proto(own, &[])
        });
        assert_eq!(found.prototype("f").unwrap().returns, Type::Other);
    }
}
