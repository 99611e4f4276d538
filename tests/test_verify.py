"""verify.py and maths.py: what is read, what is equal, and that no answer hangs, crashes or bribes it.

Cases marked in the issue's data (`../shared/verify`) are scored as a whole; everything else is spelled out here.
NANOT1_FUZZ=100000 runs the full fuzz (about five minutes); the default is a slice of it.
"""

import collections
import contextlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import latex
import maths
import verify
from verify import (
    ParseError,
    exact_arithmetic,
    is_correct,
    last_boxed,
    reference_answer,
    verify_many,
)

ROOT = Path(__file__).resolve().parent.parent


def equal(gold: str, answer: str) -> bool:
    return is_correct(f"Thus \\boxed{{{answer}}}.", gold)


def pairs(text: str) -> list[tuple[str, ...]]:
    """Lines of `gold ## answer`."""
    return [tuple(line.split(" ## ")) for line in text.strip().split("\n")]


EQUAL = r"""
\frac{1}{2} ## 0.5
1/3 ## \frac13
\dfrac{3}{4} ## 0.75
-\frac{2}{3} ## \frac{-2}{3}
-\frac{2}{3} ## -2/3
0.\overline{3} ## \frac13
1,000 ## 1000
1{,}000{,}000 ## 1000000
10^6 ## 1000000
5\times 10^{3} ## 5000
3.0\times10^8 ## 300000000
\$1,234.50 ## 1234.5
50\% ## 50
50\% ## 0.5
50\% ## \frac{1}{2}
50 ## 50 \text{ meters}
12 \text{ cm} ## 12\text{ centimeters}
12 \text{ cm}^2 ## 12
12 \text{ square centimeters} ## 12\text{ cm}^2
5 \text{ hours} ## 5 \text{ hrs}
\$5 ## 5 \text{ dollars}
90^\circ ## 90
90^\circ ## 90\text{ degrees}
\frac{\pi}{2} ## 90^\circ
90^\circ ## \frac{\pi}{2}
x=3 ## 3
3 ## x = 3
3 = x ## 3
x = 1, 2 ## 1, 2
1, 2 ## x=1 \text{ or } x=2
x=1 \text{ or } x=2 ## x=2, x=1
\{1,2\} ## 1, 2
1,2,3 ## \{3,2,1\}
(1,2) ## (x,y) = (1,2)
(1,2) ## x=1, y=2
\pm 3 ## 3,-3
x = \pm 3 ## -3, 3
1 \pm \sqrt{2} ## 1+\sqrt2, 1-\sqrt2
\frac{1\pm\sqrt5}{2} ## \frac{1+\sqrt{5}}{2}, \frac{1-\sqrt{5}}{2}
[0,1) ## 0 \le x < 1
(-\infty, 3] ## x \le 3
x>2 ## (2, \infty)
x \in (2,\infty) ## x > 2
(-\infty,1)\cup(1,\infty) ## x \neq 1
(-\infty,1)\cup(1,\infty) ## \mathbb{R}\setminus\{1\}
(-\infty,\infty) ## \mathbb{R}
\mathbb{R} ## (-\infty, \infty)
x<-1 \text{ or } x>1 ## (-\infty,-1)\cup(1,\infty)
(-\infty,-1)\cup(1,\infty) ## |x| > 1
[-3,3] ## |x| \leq 3
2x + 3 = 7 ## 2x = 4
y = 2x + 3 ## 2x - y + 3 = 0
y=2x+3 ## 2x+3
x^2+y^2=4 ## y^2 + x^2 - 4 = 0
3x-4y+5=0 ## -3x+4y-5=0
\begin{pmatrix}1\\2\end{pmatrix} ## \begin{bmatrix} 1 \\ 2\end{bmatrix}
\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix} ## \begin{bmatrix}1 & 2\\3 & 4\end{bmatrix}
\begin{pmatrix} 1/3 \\ 2/3\end{pmatrix} ## \frac{1}{3}\begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix} -2 \\ 3 \end{pmatrix} ## (-2, 3)
\begin{pmatrix} -2 \\ 3 \end{pmatrix} ## \langle -2, 3\rangle
\text{(C)} ## C
C ## \text{(C)}
\text{(C)} ## (C)
\textbf{(C)} ## C
C ## C.
\text{east} ## East
\text{even} ## even
\text{ellipse} ## \text{an ellipse}
\text{Navin} ## Navin
52_8 ## 52_{8}
1011_2 ## (1011)_2
2A_{16} ## 2A_{16}
3:5 ## 3 : 5
3:5 ## 6:10
2:30 ## 2{:}30
3:30 \text{ p.m.} ## 3:30
3:30\text{ p.m.} ## 3:30 \text{ pm}
1\frac{1}{2} ## \frac32
2\frac{3}{4} ## 2.75
1 1/2 ## 1.5
-1\frac12 ## -1.5
\sqrt{8} ## 2\sqrt2
\sqrt{12} ## 2*sqrt(3)
\frac{1}{\sqrt2} ## \frac{\sqrt2}{2}
\sqrt[3]{8} ## 2
\sqrt[3]{2} ## 2^{1/3}
\sqrt[3]{-8} ## -2
\log_2 8 ## 3
\log_{10} 1000 ## 3
\ln e^2 ## 2
\sin 30^\circ ## \frac12
\cos(\pi/3) ## 0.5
\sin^2 x + \cos^2 x ## 1
\sin 2x ## 2\sin x\cos x
\tan^{-1} 1 ## \frac{\pi}{4}
e^{i\pi} ## -1
(1+i)^2 ## 2i
2-3i ## -3i+2
\frac{1}{1+i} ## \frac{1-i}{2}
x^2+2x+1 ## (x+1)^2
(x+1)(x-1) ## x^2-1
\frac{x^2-1}{x-1} ## x+1
x^2 - 1 ## (x-1)(x+1)
a^2b ## ba^2
2ab ## 2 a b
n! ## n(n-1)!
\binom{5}{2} ## 10
5! ## 120
\frac{n(n+1)}{2} ## \binom{n+1}{2}
2^{n+1} ## 2\cdot 2^n
(-1)^n ## (-1)^{n+2}
e^{2x} ## (e^x)^2
\ln(x^2+1) ## \ln(1+x^2)
|x| ## \sqrt{x^2}
\lfloor 3.7 \rfloor ## 3
x_1 + x_2 ## x_2+x_1
\alpha\beta ## \beta\alpha
2\pi r ## 2 r \pi
\frac{4}{3}\pi r^3 ## \frac{4\pi r^3}{3}
f(x) = x^2 ## x^2
x^2 ## f(x)=x^2
P(x) = x^2 - 1 ## x^2-1
p(x)=x+1 ## x+1
A = 5 ## 5
\angle ABC = 50^\circ ## 50
AB = 5 ## 5
\text{Area} = 5 ## 5
5 \text{ apples} ## 5
5 ## 5 apples
5 ## 5 \text{ students}
8 ## 8\,\text{cm}
8 ## 8 cm
16 ## 16 \text{ square units}
7 ## 7.0
7 ## 007
7 ## +7
7 ## {7}
7 ## (7)
7 ## \mathbf{7}
7 ## \text{7}
7 ## $7$
7 ## 7.
7 ## \,7\,
0.1 ## .1
3.14 ## 3.140
1.5e3 ## 1500
x=5 ## x=5.
10 \text{ m/s} ## 10 \text{ meters per second}
10 ## 10 \text{ km/h}
1{,}234 ## 1,234
12,345,678 ## 12345678
12\,345 ## 12345
2, 3, 5 ## 2,3 \text{ and } 5
2, 3, 5 ## 2, 3, and 5
(1,2),(3,4) ## (3,4),(1,2)
\{(1,2),(3,4)\} ## (1,2), (3,4)
\emptyset ## \varnothing
\emptyset ## \{\}
\infty ## +\infty
-\infty ## -\infty
\frac{-1+\sqrt{3}i}{2} ## -\frac12 + \frac{\sqrt3}{2}i
\frac{1 + \sqrt{5}}{2} ## \frac{\sqrt5+1}{2}
x^{2/3} ## \sqrt[3]{x^2}
\sqrt{x^3} ## x\sqrt{x}
\sqrt{xy} ## \sqrt{x}\sqrt{y}
\log(ab) ## \log a + \log b
\frac{\ln 5}{\ln 2} ## \log_2 5
\sin(x)\cos(x) ## \frac{\sin(2x)}{2}
\sec^2 x ## 1+\tan^2 x
\cosh x ## \frac{e^x+e^{-x}}{2}
\arcsin x ## \sin^{-1} x
x \mapsto x ## x \mapsto x
y=\frac{1}{2}x+3 ## y = 0.5x+3
y = x^2 ## x^2 = y
\frac{\pi}{6}, \frac{5\pi}{6} ## x = \frac{\pi}{6}, \frac{5\pi}{6}
(0,1) \cup (1,2) ## (0,2) \setminus \{1\}
\left(0,\frac{1}{2}\right] ## (0, 0.5]
2 \leq x \leq 3 ## [2,3]
x \ge 2 ## 2 \le x
-5 < x < 5 ## x \in (-5, 5)
k = 2, n = 3 ## n=3, k=2
\begin{cases} x=1\\y=2\end{cases} ## x=1, y=2
\frac{3}{4} ## 3 \div 4
\frac{3}{4} ## \frac{3}{4}.
\dfrac{\sqrt{3}}{2} ## \frac{1}{2}\sqrt{3}
4\sqrt{3} ## \sqrt{48}
10\% ## 10 \text{ percent}
2.5 ## 2 \frac{1}{2}
\text{Yes} ## yes
\text{no solution} ## No solution
5,\!000 ## 5000
\frac{5}{9} ## 5/9
11\sqrt{2} ## 11 \sqrt{2}
11\sqrt2 ## 15.556349186104045
0.142857142857143 ## \frac17
1.4142135623730951 ## \sqrt2
2.718281828459045 ## e
x\in\{1,2\} ## \{1,2\}
\{x \mid x > 2\} ## (2,\infty)
\frac{x}{y} ## x/y
x/(y z) ## \frac{x}{yz}
\left\{ \frac{1}{2}, 3 \right\} ## \{3, 1/2\}
r=3, \theta=\pi/2 ## \theta = \frac{\pi}{2}, r = 3
180^{\circ} - x ## 180^\circ-x
\cos 36^\circ ## \frac{1+\sqrt5}{4}
100! ## 100!
2^{100} ## 1267650600228229401496703205376
\frac{1}{2}, \frac13 ## 0.5, \frac{1}{3}
3 \text{ and } 4 ## 3, 4
25 ## 25\text{ ways}
-x^2 ## -(x^2)
\frac{a}{b} ## \frac{2a}{2b}
\vec{v} ## \vec{v}
\overline{AB} ## \overline{AB}
\triangle ABC ## \triangle ABC
A \cup B ## A \cup B
\lim_{n\to\infty} a_n ## \lim_{n \to \infty} a_n
\sum_{k=1}^n k^2 ## \sum_{k=1}^{n} k^2
\sum_{k=1}^n k ## \sum_{k=0}^n k
\int_0^1 x^2\,dx ## \int_{0}^{1} x^2 dx
\text{3} ## 3
\text{x = 3} ## 3
1.0 ## 1
\frac{22}{7} ## 3\frac{1}{7}
7:00 ## 7:00 \text{ AM}
2x+1 > 5 ## (2,\infty)
|2x-3| < 5 ## (-1,4)
|x-5|+|x-6|>1 ## (-\infty,5)\cup(6,\infty)
x^2-5x+6=0 ## 2, 3
x^2-5x+6>0 ## x<2 \text{ or } x>3
2x+3=7 ## 2x=4
\frac{AB}{CD} = 2 ## 2
5 ## 5\text{\,}.
\frac{2}{3}\text{ hours} ## \frac23
18\text{ mph} ## 18 \text{ miles per hour}
4^\text{th} ## 4
13\text{th} ## 13
5\ \mathrm{m/s^2} ## 5
5 ## 5\ \mathrm{m/s^2}
5 ## 5\text{ J/mol}
5 ## 5^\circ\text{C}
5 ## 5\ \mathrm{cm^{-3}}
70 miles per hour ## 70
12 square feet ## 12
5 \mathrm{~m} / \mathrm{s} ## 5
5 ## 5\text{ women}
5 ## 5\text{ fish}
5 ## 5元
(n-2) 2^{n}+1 ## 2^n(n-2)+1
360 ## 2^3 3^2 5
\binom{2024}{990} ## \frac{2024!}{990!\,1034!}
E ## \text{E.}
E ## E)
E ## \boldsymbol{E}
E ## \text{Answer: E}
B ## (B) 3.3\mathrm{MeV}
P(x)=-1, P(x)=x+1 ## P(x)=x+1, P(x)=-1
g(x)=2x^3+c, g(x)=-2x^3+c ## g(x)=\pm2x^3+c
e=\frac{\sqrt3}{2} ## \frac{\sqrt3}{2}
f^{-1}(x)=x+1 ## x+1
A^{-1}=\begin{pmatrix}1&2\\3&4\end{pmatrix} ## \begin{pmatrix}1&2\\3&4\end{pmatrix}
\frac{s}{r}=2 ## 2
\cos\theta=\frac12 ## \frac12
5 ## f'(2)=5
(1,2) ## P(1,2)
(x,y,z)=(2,-1,2) ## x=2, y=-1, z=2
(-\infty,0)\cup\{1\} ## t<0 \text{ or } t=1
2,3 ## a\in\{2,3\}
\{(1,2),(3,4)\} ## (x,y)\in\{(1,2),(3,4)\}
\{i,-i\} ## z=\pm i
10^{-5} ## 10⁻⁵
\frac12 ## ½
(1,2) ## （1，2）
\frac13 ## 0.\bar3
\frac13 ## 0.\dot3
\frac12 ## \nicefrac{1}{2}
5 ## \color{red}{5}
5 ## \bm{5}
x\ge5 ## x⩾5
\approx 17.1 ## 17.1
63.75^\circ ## 63^\circ45'
120 ## C_{10}^{3}
\begin{pmatrix}1\\2\\3\end{pmatrix} ## (1,2,3)^T
-2 ## \begin{vmatrix}1&2\\3&4\end{vmatrix}
x=1, y=2 ## \left\{\begin{array}{l}x=1\\y=2\end{array}\right.
x\equiv 1 \pmod 3 ## x\equiv 1 \pmod{3}
No ## no
28\% ## 28 pct
\mathbb Z ## \mathbb{Z}
1,2,\ldots,n ## 1, 2, \dots, n
6 ## \sum_{k=1}^{3} k
\pm 2 ## x^2=4
-2<x<2 ## x^2<4
\frac13 ## \int_0^1 x^2\,dx
1 ## \lim_{x\to0}\frac{\sin x}{x}
\frac{\pi^2}{6} ## \sum_{n=1}^\infty \frac{1}{n^2}
5 ## \text{Number of ways}=5
\text{Number of ways}=5 ## 5
5,000,000 ## 5\text{ million}
60 ## 5\text{ dozen}
\frac{5}{3} ## 5\text{ thirds}
x^2-x ## x(x-1)
\frac{x}{2} ## \frac{x^2}{2x}
3! 2! ## 12
|x-5| ## \begin{cases} x-5 & x\ge5 \\ 5-x & x<5 \end{cases}
x\equiv 7 \pmod{12} ## x \equiv 19 \pmod{12}
2^{2024} ## 4^{1012}
\sqrt{2}\cdot\sqrt{3} ## \sqrt6
(2^{2024}+1)(2^{2024}-1) ## 2^{4048}-1
\frac{n(n+1)}{2} ## \sum_{k=1}^{n} k
(2k-1)!! ## \frac{(2k)!}{2^k k!}
5 ft 8 in ## 5\text{ feet }8\text{ inches}
\$15\text{ per hour} ## 15 dollars per hour
1.41 ## \sqrt2\approx1.41
\text{no solution} ## \emptyset
\mathbb R ## \text{all real numbers}
500500 ## \sum_{k=1}^{1000}k
10 ## 2.5(4)
p=3,n=4 ## 3,4
0 ## \frac{\sqrt{18}}{3}-\sqrt2
0 ## \tan y-\frac{\sin y}{\cos y}
52_8 ## 52_8.
1,600 ## \,1,600\,
x>2^{2024} ## (2^{2024},\infty)
\frac{1}{3} ## 0.1\overline{6}\cdot2
\begin{pmatrix}1&5\\0&1\end{pmatrix} ## \begin{pmatrix}1&1\\0&1\end{pmatrix}^{5}
\gcd(a,b) ## \gcd(b,a)
\Gamma(1/2) ## \sqrt\pi
\int_0^\infty e^{-x^3} dx ## \Gamma(4/3)
\sum_{n=1}^\infty 1/n^3 ## \zeta(3)
\max^2(1,2) ## 4
\ln^{-1} 2 ## \frac{1}{\ln 2}
\$5 \text{ million} ## 5000000
5 \text{ hundred million} ## 500000000
1 ## \operatorname{min}(1,2)
f(\sqrt8/2) ## f(\sqrt2)
\begin{cases} 1 & |\foo x| \\ 2|x| & x>1 \end{cases} ## \begin{cases} 1 & |\foo x| \\ 2|x| & x>1 \end{cases}
Rs. 5 ## 5
[[1,2],[3,4]] ## \begin{pmatrix}1&2\\3&4\end{pmatrix}
C_{n}^{k} ## \binom{n}{k}
A_{*} ## A_{*}
26 ## \text{(C) } 26
\varnothing ## \text{no solution}
5 ## 5\text{ dollars an hour}
\frac{n}{2} ## 1\frac n2
"""

DIFFERENT = r"""
\frac{1}{2} ## \frac{1}{3}
0.33 ## \frac13
\frac13 ## 0.3333
3 ## x \neq 3
3 ## 3 \text{ is wrong}
3 ## \text{not } 3
3 ## not 3
3 ## 3 or 4
3 ## 3, 4
3,4 ## 3
12 \text{ cm} ## 12\text{ m}
12 \text{ cm}^2 ## 12\text{ cm}
\$5 ## 5 \text{ cents}
5 \text{ hours} ## 5 \text{ minutes}
90^\circ ## 90 \text{ cm}
0.5 ## 50
0.5 ## 0.5\%
50 ## 50\%
(1,2) ## [1,2]
(1,2) ## (2,1)
(1,2) ## \{1,2\}
(1,2) ## 1,2
[0,1) ## 0 \le x \le 1
x>2 ## x \geq 2
x>2 ## x<2
|x|>1 ## |x|\ge 1
x^2<4 ## x^2<5
y=2x+3 ## y=2x+4
y=2x+3 ## y = y
x=5 ## y=5
2x+3=7 ## 3
\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix} ## \begin{pmatrix}1 & 3\\2 & 4\end{pmatrix}
\begin{pmatrix}1 & 2\end{pmatrix} ## \begin{pmatrix}1 \\ 2\end{pmatrix}
\text{(C)} ## D
C ## \text{A, B, C}
C ## A or C
\text{east} ## west
\text{even} ## odd
\text{even} ## neven
\text{even} ## not even
52_8 ## 52_9
52_8 ## 42
3:5 ## 5:3
12:00 ## 1:00
3:30\text{ p.m.} ## 3:30\text{ a.m.}
1\frac12 ## \frac12
\sqrt{2} ## 1.414
\pi ## 3.14
\pi ## \frac{22}{7}
x ## \sqrt{x^2}
|x-100| ## 100-x
|x-100| ## x-100
x ## |x|
x^2 ## x^2+10^{-20}
0 ## 10^{-40}
0 ## e^{-1000}
0 ## \frac{1}{10^{100}}
42 ## 42+10^{-100}
42 ## 42.000000000000000001
42 ## 41.99999999999999999
\sin x ## \cos x
x+1 ## y+1
f(x) ## f(y)
x ## X
n! ## (n+1)!
\log_2 3 ## \log_3 2
(-1)^n ## 1
(-1)^n ## -1
\lfloor x \rfloor ## x
a_1 ## a_2
a_n ## a_{n+1}
x=4=3 ## 3
3 ## x=4=3
3 ## 4=3
3 ## x \approx 4
2 ## 1+2
10 ## 10x
10 ## 10!
10 ## 10i
10 ## 10^2
10 ## 10_2
10 ## 100
10 ## 1 0
10 ## -10
10 ## (10, 10)
10 ## \{10, 11\}
10 ## 10 \text{ million}
10 ## 10 thousand
10 ## 10 \text{ maybe}
10 ## 10 \text{ incorrect}
10 ## approximately 10
10 ## 10 \text{ times } 2
10 ## 10 \text{ plus } 5
10 ## 10?
10 ## 10 \pm 1
10 ## [10, 10]
10 ## x > 10
10 ## \le 10
10 ## 10 \le x
10 ## 10 + C
10 ## \text{10}1
10 ## \phantom{10}
10 ## \%10
10 ## 10/0
10 ## \text{the answer}
10 ## x
x=3 ## x
\{1,2\} ## \{1,2,3\}
1,2 ## 1,-2
(1,2),(3,4) ## (1,2),(4,3)
(1,2),(3,4) ## (1,2,3,4)
\emptyset ## 0
\emptyset ## \{0\}
\emptyset ## \{\emptyset, 1\}
\infty ## -\infty
\infty ## 10^{1000}
\frac{0}{0} ## 0
\frac{1}{0} ## \infty
2i ## 2
1+i ## 1-i
\sqrt{-4} ## 2
e^{x} ## e^{-x}
\frac{x}{y} ## \frac{y}{x}
(0,1)\cup(1,2) ## (0,2)
(0,1)\cup(1,2) ## (0,1)\cap(1,2)
1,234 ## 1.234
1,234 ## 234
5 ## 5\sqrt{1.0001}
2^{1009} ## 2^{1009}+1
\frac{1}{2006!} ## \frac{1}{2007!}
x \in [1,2] ## x \in [1,3]
\sum_{k=1}^n k^2 ## \sum_{k=1}^n k^3
\sum_{k=1}^n 2^k ## \sum_{k=0}^n 2^k
\prod_{k=1}^n 2k ## 2\prod_{k=1}^n k
abc ## abd
AB ## AC
\text{Evelyn, Briana} ## \text{Evelyn}
1:2:3 ## 1:2
18 ## 18 \text{ \% 42}
x^2 ## x^{2.0001}
\frac{\sqrt{3}}{2} ## 0.866
4 ## 4 + 0i + j
2\pi ## 2
10 ## ten
5 \text{ feet} ## 5 \text{ inches}
100 ## 1e3
1000 ## 1,00
3.5 ## 3,5
odd ## ddo
\sqrt2 ## \infty
\pi ## -\infty
\infty ## \pi/2
i ## \infty
(0,\pi) ## (0,\infty)
(-\infty,\infty) ## (-\sqrt2,\sqrt2)
\tan 90^\circ ## \infty
x>2 ## (x-2)(x-5)^2>0
2,3 ## x^2-5x+6=0
x=2 \text{ or } x=3 ## (x-2)(x-3)=0
(2,\infty) ## 2x+1 > 5
x>2 ## 2x+1 > 5
(-1,4) ## |2x-3| < 5
(2,\infty) ## (x-2)(x-5)(x-6)>0
\mathbb{R} ## (x-7)^2>0
\mathbb{R} ## |7x-3|>0
\mathbb{R} ## 2x+1<7 \text{ or } 2x+1>7
x>2 ## |x-5|+|x-6|>1
(2,\infty) ## x>2, y>2
60\text{ min} ## 0+(60\text{ hours})
8 ## 5\text{ m}+3\text{ cm}
2y=10\text{ m}+x ## 2y=10\text{ cm}+x
3 ## x^{-1}=3
10^{30} ## \sqrt{10^{60}+1}
2^{2024}+1 ## 2^{2024}-1
1-\frac{1}{2024!} ## 1-\frac{1}{2023!}
\binom{200}{100}-1 ## \binom{200}{100}
\frac{\binom{2024}{990}+23}{46} ## \frac{\binom{2024}{990}+22}{46}
\sqrt{2^{2024}+1} ## 2^{1012}
10^{10^{10}} ## 10^{10^{10}}+1
e^{-1000}+1 ## 1
\tanh 1000 ## 1
x \equiv 7 \pmod{12} ## x \equiv 12 \pmod 7
n \equiv 0 \pmod 4 ## n = 0
\overrightarrow{AB} ## \overrightarrow{BA}
\angle ABC ## \angle BAC
a \mid b ## b \mid a
f\circ g ## g\circ f
IV ## VI
\begin{cases} x & x>0 \\ 1 & x\le0 \end{cases} ## \begin{cases} 1 & x>0 \\ x & x\le0 \end{cases}
\begin{cases} x & x>0 \\ 1 & x\le0 \end{cases} ## \begin{cases} x & x\ge0 \\ 1 & x<0 \end{cases}
\begin{cases} x & x>0 \\ 1 & x\le0 \end{cases} ## x, 1
5 ## \begin{aligned} 5 & 6 \end{aligned}
\begin{pmatrix}1&2\\3&4\end{pmatrix} ## \begin{vmatrix}1&2\\3&4\end{vmatrix}
1,001 ## 1
40,000 ## 0, 40
222 ## 222,222
N(0)e^{-\lambda t} ## 0
(1,2) ## y=1, x=2
(1,2) ## (y,x)=(1,2)
5 ## 5 \text{ thirds}
5 ## 5 \text{ tenths}
5 ## 5 \text{ trillions}
(n+1) 3^{n} ## n+1 3^{n}
|x-1000| ## 1000-x
\lfloor x\rfloor ## \lceil x\rceil-1
|x-3|+|x-3.01| ## |2x-6.01|
\vec a\times\vec b ## \vec b\times\vec a
\frac{dy}{dx} ## \frac{y}{x}
C ## \text{(D) Both (C) and (A)}
6 ## \sum_{k=1}^{4} k
\pm 2 ## x^2=5
-2<x<2 ## x^2\le4
\frac13 ## \int_0^1 x^3\,dx
5\text{ mW} ## 5\text{ MW}
5\text{ m/s} ## 5\text{ cm/s}
v=20\text{ m/s} ## 20\text{ cm/s}
5 ## 5\text{ hundred}
\frac13 ## 0.3333333333333333333333333333
F_{2024}-1 ## F_{2024}
e=\frac12 ## e=2
"""

BRIBES = r"""
2:3 ## 0:0
2:3:5 ## 0:0:0
\emptyset ## 0x=0
(1,2) ## 2x\in(1,2)
(1,2) ## 5\in(1,2)
x>2 ## -x\in(2,\infty)
\mathbb{R} ## i\in\mathbb R
x=5 ## x=10-x
x=5 ## x=3x-10
0, 3 ## x^2=3x
(0,3) ## x^2<3x
5 ## 2x=10
(5,\infty) ## 2x>10
\emptyset ## x<x
1, 1, 2 ## 1, 2, 2
2, 3 ## 2, 3, 3
|x-1| ## x-1+0\sqrt{x-1}
\max(x,1) ## x+0\sqrt{x-1}
x ## \lfloor x\rfloor+0\cdot x!
x^2 ## x^2+\sin(\pi x)+0\cdot x!
3 ## \gcd(0.5,189130)
\int_0^x e^{-t^2}dt ## \int_0^x e^{-(1234/567)^2}dt
1 ## \zeta(1000)
x>0 ## x>10^{-80}
\frac\pi6 ## (\frac\pi6)^\circ
5 \text{ cm}^2 ## 5\text{ cm}^29
5 ## 5以上
5 ## 5左右
5 ## 5不对
5 ## 5\text{ fives}
5 ## 5\text{ lies}
5 ## 5\text{ upwards}
10 ## 10\text{ pairs}
5 ## \text{not}=5
5 ## \text{The answer is not}=5
B ## B. C. D. A
B ## B: A, C
B ## B. No, it is C
AB ## BA
ABC ## ACB
\begin{pmatrix}1&2\\3&4\end{pmatrix} ## \begin{pmatrix}1&2\\3&4\end{pmatrix}+\begin{pmatrix}0&0&9\\0&0&9\end{pmatrix}
[[1,3],[2,4]] ## \begin{pmatrix}1&2\\3&4&99\end{pmatrix}^T
1 ## \lim_{x\to0}\frac{|x|}x
\infty ## \lim_{x\to0}\frac1x
3:05 ## 3:5
\emptyset ## \begin{cases}\end{cases}
x\ge3 ## [3,\infty]
\frac13 ## \frac13\approx0.4
\binom{n}{k}(-1)^n ## \binom{n}{k}(-1)^k
\max(x,10^7) ## 10^7
|x_1x_2| ## x_1x_2
|x^3-10^{12}| ## 10^{12}-x^3
|\ln x-30| ## 30-\ln x
\lceil y-2081\rceil ## \lceil (y-2081)(1+10^{-5})\rceil
x < 2^{200}+50 ## x < 2^{200}+50+10^{-40}
\int_0^1 e^{x^3}dx ## \int_0^1 e^{x^3(1+10^{-70})}dx
f(\sqrt2) ## f(\sqrt2+10^{-90})
\int_0^1 e^{-x^2} dx ## \frac{\sqrt\pi}{2} e r f
\int_0^1 \frac{\sin x}{x} dx ## i S
\Gamma(\frac12) ## \frac{\Gamma}{2}
|\vec v| ## \vec v
|\overline{AB}| ## \overline{AB}
\max(\overline{AB},\overline{CD}) ## \overline{AB}
\max^2(1,2) ## 2
2 ## \gcd_7^9(4,6)
\max_{0\le x\le1}(x,3) ## \max_{5\le x\le7}(x,3)
3:5 ## 3:05
3 ## 3 \text{ ones}
5 ## 5\text{ per thousand}
5 ## 5\text{ per two}
5 ## 5/\text{half}
5 ## 5\text{ each half}
5 ## 5\text{ a dozen}
5 ## 5\text{ per not}
5 ## 5\text{ an error}
5 ## 5\text{ lakhs}
5 ## \text{definitely greater than}=5
5 ## \lnot x=5
5 ## (x,y)=5
C ## C. alternatively D
C ## C. wrong
C ## C. D?
x>2 ## y>2
C ## C: I think D
C ## C. Either B
"""


@pytest.mark.parametrize("gold, answer", pairs(EQUAL))
def test_equal(gold, answer):
    """Guards against a right answer that earns nothing because of how it is written (the silent zero)."""
    assert equal(gold, answer), verify.verify(f"\\boxed{{{answer}}}", gold)


@pytest.mark.parametrize("gold, answer", pairs(DIFFERENT))
def test_different(gold, answer):
    """Guards against a wrong, hedged or merely near answer that is rewarded."""
    assert not equal(gold, answer), verify.verify(f"\\boxed{{{answer}}}", gold)


@pytest.mark.parametrize("gold, answer", pairs(BRIBES))
def test_not_bribed(gold, answer):
    """Guards against what a policy would find: the question restated, what is true of everything, crafted points."""
    assert not equal(gold, answer), verify.verify(f"\\boxed{{{answer}}}", gold)


# ------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize(
    "text, box",
    [
        (r"\boxed{1} no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} \}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"as \boxed asks: \boxed{4} in \boxed", "4"),
        (r"\boxed{5", None),
        (r"\boxed{5} then \boxed{6", None),
        (r"\boxed", None),
        ("42", None),
        ("", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, box):
    """Guards against an earlier box (a candidate, a step) or an unfinished one being taken for the answer."""
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    "response, gold",
    [
        ("so 4\n#### 72", "72"),
        ("The answer is $\\frac{1}{2}$.", "0.5"),
        ("The answer is: **1,234**", "1234"),
        ("it costs 3 and 4, in total 7 dollars", "7"),
        ("The final answer is (7, 6). I hope it is correct.", "(7,6)"),
    ],
)
def test_lenient_is_off_unless_asked_for(response, gold):
    """Guards against unboxed answers earning rewards, and against foreign models scored 0 for their format."""
    assert verify.verify(response, gold).outcome == "no_answer"
    assert verify.verify(response, gold, lenient=True).correct


@pytest.mark.parametrize(
    "field, answer",
    [
        ("3+4\n#### 1,234", "1,234"),
        (27.0, "27"),
        ("27.0", "27"),
        (5, "5"),
        (r"so \boxed{x^2}", "x^2"),
        ("C", "C"),
    ],
)
def test_reference_answer(field, answer):
    """Guards against comparing with a dataset's whole solution, or with the .0 that a CSV once added."""
    assert reference_answer(field) == answer


def test_tolerance_is_relative_and_off_by_default():
    """Guards against rounding being rewarded, or tiny numbers being equal because their difference is tiny."""
    assert not equal("0.3333", "1/3")
    assert verify.verify(r"\boxed{1/3}", "0.3333", tolerance=1e-3).correct
    assert not verify.verify(r"\boxed{10^{-9}}", "10^{-8}", tolerance=1e-3).correct


# ------------------------------------------------------------------------------------------------ labelled data


@pytest.fixture(scope="module")
def cases(shared):
    return cli.read_jsonl(shared / "verify" / "cases.jsonl")


@pytest.mark.parametrize(
    "name, groups", [("cases", None), ("cases_field", ["field"]), ("cases_field", ["variant"])]
)
def test_labelled_cases(shared, name, groups):
    """Guards against a rule that was fitted to our own cases: answers gathered by others, right and wrong."""
    rows = cli.read_jsonl(shared / "verify" / f"{name}.jsonl")
    chosen = [
        row
        for row in rows
        if not row.get("debatable") and (groups is None or row["group"] in groups)
    ]
    right, accepted, times = collections.defaultdict(list), [], []
    for case in chosen:
        start = time.thread_time()
        got = is_correct(case["prediction"], case["gold"])
        times.append(time.thread_time() - start)
        right[case["kind"]].append(got == case["equal"])
        if got and not case["equal"]:
            accepted.append((case["gold"], case["prediction"]))
    assert statistics.mean(ok for kind in right.values() for ok in kind) >= 0.99
    assert accepted == []
    assert all(statistics.mean(kind) >= 0.96 for kind in right.values() if len(kind) >= 20)
    assert statistics.median(times) < 0.002
    assert max(times) < 2


def test_our_own_answers():
    """Guards against the kinds of mistake that answers.jsonl was written to find, before its author saw any rule.

    The known ones are in RESULTS.md: nine right answers that are not seen, and T(n-1)+1 read as a product.
    """
    rows = cli.read_jsonl(Path(__file__).with_name("answers.jsonl"))
    wrong = [row for row in rows if is_correct(row["prediction"], row["gold"]) != row["equal"]]
    assert len(rows) > 2_400
    assert [row["gold"] for row in wrong if not row["equal"]] in ([], ["T(n-1)+1"])
    assert len(wrong) <= 10, wrong


def test_answers_of_models():
    """Guards against the mistakes that a reader of the rules found: first what models would write, then by hunting.

    RESULTS.md has the first counts, and what is still not seen.
    """
    rows = cli.read_jsonl(Path(__file__).with_name("answers_of_models.jsonl"))
    wrong = [row for row in rows if is_correct(row["prediction"], row["gold"]) != row["equal"]]
    assert len(rows) > 3_400
    assert [row for row in wrong if not row["equal"]] == []
    assert len(wrong) <= 52, wrong


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        (r"\$1200", r"\text{\$}1{,}200", True),
        (r"\$7.50", r"\text{US\$7.50}", True),
        (r"\$7", r"\text{\$8}", False),
        (r"6.02\times 10^{23}", "6.02 x 10^{23}", True),
        (r"6.02\times 10^{23}", "6.02x10^{22}", False),
        ("2x+1000", "2x+10^3", True),
        ("r=3, r=-3", "r_1=3, r_2=-3", True),
        (r"\{5,2\}", "x_1=2, x_2=5", True),
        (r"\{5,3\}", "x_1=2, x_2=5", False),
        ("a_1=4, a_2=1", "a_1=1, a_2=4", False),
        ("y=1, y=2", "x_1=1,x_2=2", False),
        ("17", "p+q=17", True),
        ("17", "pq=17", True),
        ("18", "p+q=17", False),
        ("17", "2p+3=17", False),
        ("17", "x^2=17", False),
        ("p+q=18", "p+q=17", False),
        ("17", r"\frac{a}{b}=17", True),
        (r"\frac27", r"P(\text{both red})=\frac{2}{7}", True),
        ("5", r"\text{not }x = 5", False),
        ("17", "(p,q)=17", False),
        ("4", "a-b=4", True),
        (r"9\pi\text{ ft}", r"9\pi ft", True),
        (r"9\pi", r"9\pi x", False),
        (r"45\text{ km/h}", r"45\ \frac{\text{km}}{\text{h}}", True),
        (r"45\text{ km/h}", r"45\ \frac{\text{h}}{\text{km}}", False),
        (r"45\text{ km/h}", r"45\ \frac{\text{km}}{\text{s}}", False),
        (r"7\text{ N}", "7.0 N", True),
        (r"7\text{ N}", "7.0 J", False),
        (r"7.0\times10\ \mathrm{m/s^2}", "70 m/s^2", True),
        (r"7\text{ hours}", "7 h", True),
        (r"7\text{ hours}", "7 m", False),
        ("mgh", "E=mgh", True),
        ("mgh", "E=mgk", False),
        ("mgh", r"m\cdot g", False),
        (r"60^\circ", r"60{}^\circ", True),
        (r"\frac34", r"\frac{3}{4} \\", True),
        (r"2.5\text{ kg}", r"\approx 2.5\text{ kg}", True),
        (r"2.6\text{ kg}", r"\approx 2.5\text{ kg}", False),
        (r"\sin\phi", r"\sin\varphi", True),
        (r"2\phi", r"\varphi+\phi", False),
        (r"\epsilon", r"\varepsilon", True),
        (r"\sin x + C", r"\sin x + c", True),
        (r"\sin x + C", r"\sin x - c", False),
        (r"\sin x + C", r"\cos x + c", False),
        ("ab + c", "ab + C", False),
        ("a + b + C", "a + b + c", False),
        (r"[-3,\infty)", r"-3\le x<\infty", True),
        (r"[-3,\infty)", r"-3< x<\infty", False),
        (r"(-\infty,4]", r"-\infty<x\le 4", True),
        (r"(0,\infty)", r"-\infty<x<\infty", False),
        (r"\text{No solution}", r"\text{There are no solutions}", True),
        (r"\text{does not exist}", r"\text{DNE}", True),
        (r"\text{does not exist}", "DNE", True),
        ("0", "DNE", False),
        (r"\text{circle}", r"\text{a circle}", True),
        (r"\text{circle}", r"\text{an ellipse}", False),
        (r"\text{Yes}", "YES", True),
        (r"\text{Yes}", "NO", False),
        ("5:2", "5 to 2", True),
        ("5:2", "2 to 5", False),
        ("x:5", "x to 5", False),
        (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)\bigcup(2,\infty)", True),
        (r"(-\infty,1)\cup(2,\infty)", "(-oo,1)U(2,oo)", True),
        (r"(-\infty,1)\cup(2,\infty)", "(-oo,1)U(3,oo)", False),
        (r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}-\{2\}", True),
        (r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}-\{3\}", False),
        (r"\pm3", "+/-3", True),
        (r"\frac{5}{11}", r"0.4545\ldots", True),
        (r"\frac56", "0.8333...", True),
        (r"\frac56", "0.83...", False),
        (r"\pi", "3.1415926535...", False),
        ("1", "0.999...", True),
        (r"\frac{41}{333}", "0.123123...", True),
        ("1", "1.00...", False),
        ("22", "22nd", True),
        ("21", "21th", False),
        ("3", "3^{rd}", True),
        ("x=5,y=7", r"x=5\quad y=7", True),
        ("x=7,y=5", r"x=5\quad y=7", False),
        (r"3\mathbf{i}-\mathbf{j}", r"3\hat{i}-\hat{j}", True),
        (r"3\mathbf{i}-\mathbf{j}", r"3\hat{i}-\hat{k}", False),
        (r"\binom82", "^{8}C_2", True),
        ("28", "_{8}C_2", True),
        ("28", "_{8}C_3", False),
        (r"\triangle DEF", r"\Delta DEF", True),
        (r"\triangle", r"\Delta", False),
        (r"\sqrt{pq}", r"\sqrt{p}q", False),
        (r"\ln{pq}", r"\ln{p}q", False),
        ("pq", r"p\\q", False),
        (r"\theta", r"\Theta", False),
        ("kt", "Kt", False),
        ("PV=NRT", "PV=nRT", False),
        (r"\frac{p}{q r}", r"\frac{p q}{r}", False),
        (r"\emptyset", r"\{\emptyset\}", False),
        ("B", "B. (C)", False),
        ("B", "(B) (C)", False),
        ("B", "B. Triangles", True),
        ("B", "B. also A", False),
        ("A", "A, C or D", False),
        ("B,C", "B or C", False),
        ("B,C", "B and C", True),
        ("4", "4 per mil", False),
        (r"2\text{ h }5\text{ min}", r"2\text{ h or }5\text{ min}", False),
        ("7", "***7***", True),
        ("12", "D. 12", True),
        ("13", "D. 12", False),
    ],
)
def test_what_models_write(gold, answer, right):
    """Guards against refusing what models box (money in \\text, 1.2 x 10^5, x_1 and x_2, m + n = 73, 5.0 J).

    And against the neighbour of each: another root, unit or letter, an equation instead of a value.
    """
    assert equal(gold, answer) == right


# ------------------------------------------------------------------------------------------------ what sympy is asked


def closed(gold: str, answer: str) -> str:
    """The verdict without sympy: "undecided" where it would be asked."""
    return verify.decide(rf"\boxed{{{answer}}}", gold, 2.0, False, 0.0).outcome


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        (r"\frac13", r"\int_0^1 x^2\,dx", True),
        (r"\frac12", r"\int_0^1 x^2\,dx", False),
        (r"\frac{\pi^2}{6}", r"\sum_{n=1}^\infty \frac1{n^2}", True),
        (r"\frac{\pi^2}{8}", r"\sum_{n=1}^\infty \frac1{n^2}", False),
        ("1", r"\lim_{x\to0}\frac{\sin x}{x}", True),
        ("2", r"x^3=8", False),
        (r"2, -1\pm i\sqrt3", r"x^3=8", True),
        (r"(-2,2)", r"x^4<16", True),
        (r"[-2,2]", r"x^4<16", False),
    ],
)
def test_sympy_is_asked_in_a_worker(gold, answer, right):
    """Guards against closed values that are never computed, and against sympy in the process that trains."""
    assert closed(gold, answer) == "undecided"
    assert equal(gold, answer) == right
    assert "sympy" not in vars(verify)


@pytest.mark.parametrize(
    "answer", ["x=5", "5", "x^2", r"\sin x", "2x<4", r"\sum_{k=1}^{99} k", "x^2=5"]
)
def test_sympy_is_not_asked_without_need(answer):
    """Guards against half a second for every wrong answer of a training run."""
    assert closed("7", answer) in ("wrong", "correct")


def test_questions_that_sympy_cannot_answer_end():
    """Guards against a worker that computes for ever, or is killed for every such answer."""
    hard = [
        r"\int_0^{10^9} \lfloor x\rfloor^{\lfloor x\rfloor}\,dx",
        r"\sum_{n=1}^\infty \frac{\sin(n^3)}{n^{2}+\pi}",
    ]
    hard += [
        r"\lim_{n\to\infty} \sin(n^{n^n})",
        r"\int_0^1 x^{x^{x^x}}\,dx",
        r"\int_0^1 " + "x^{60}+" * 30 + r"1\,dx",
    ]
    for answer in hard:
        start = time.monotonic()
        assert verify.verify(rf"\boxed{{{answer}}}", "13").outcome in ("wrong", "timeout")
        assert time.monotonic() - start < 20


# ------------------------------------------------------------------------------------------------ attacks


ATTACK = """
import json, re, sys, time, verify
for line in open(sys.argv[1], encoding="utf-8"):
    case = json.loads(line.replace("@PWNED@", sys.argv[2]))
    start = time.perf_counter()
    got = verify.is_correct(case["response"], case["gold"])
    row = [case["note"], got, case["expected"], time.perf_counter() - start]
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
    print(json.dumps([*row, peak]), flush=True)  # not ru_maxrss: that is inherited from whoever started the process
"""


def test_attacks(shared, tmp_path):
    """Guards against answers that hang, crash, execute, exhaust memory or cheat: all of them, in one process."""
    attacks = shared / "verify" / "attacks.jsonl"
    command = [sys.executable, "-c", ATTACK, str(attacks), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == attacks.read_text(encoding="utf-8").count("\n")
    assert [
        note for note, got, expected, *_ in rows if expected is not None and got != expected
    ] == []
    assert max(seconds for *_, seconds, _ in rows) < 2
    assert max(megabytes for *_, megabytes in rows) < 60
    assert list(tmp_path.iterdir()) == []


def references(shared: Path) -> list[str]:
    found = []
    for name in ("math500", "aime2024", "amc23", "gsm8k_test", "aqua"):
        for row in cli.read_jsonl(shared / "data" / f"{name}.jsonl"):
            found.append(reference_answer(row["answer"] if "answer" in row else row["correct"]))
    return list(dict.fromkeys(found))


def test_every_reference_parses_and_equals_itself(shared):
    """Guards against a reference that can never be matched: a problem that no answer solves, whatever is trained."""
    golds = references(shared)
    assert len(golds) > 500
    for gold in golds:
        maths.read(latex.tokenise(gold), set())  # raises, if it does not parse
        value = (
            not any(sign in gold for sign in ("=", r"\text", r"\in", ",", ":"))
            and not gold.isalpha()
        )
        forms = [
            f" {gold} ".replace("+", " + ").replace(",", ", ")
            if not gold.replace(",", "").isdigit()
            else f" {gold} ",
            gold.replace(r"\frac", r"\dfrac").replace("(", r"\left(").replace(")", r"\right)"),
            f"y = {gold}" if value else f"{{{gold}}}",
            *(
                [rf"{gold} \text{{ units}}"]
                if value and not any(c in gold for c in "\\^_$%")
                else []
            ),
        ]
        for form in forms:
            if r"\left(" in form and form.count("(") != form.count(")"):
                continue  # half-open intervals
            assert equal(gold, form), (gold, form)


# ------------------------------------------------------------------------------------------------ identities

x, y, a = sympy.symbols("x y a")
FORMS = {
    "expand": sympy.expand,
    "factor": sympy.factor,
    "together": sympy.together,
    "collect": lambda e: sympy.collect(sympy.expand(e), x),
    "expand_trig": sympy.expand_trig,
    "powsimp": sympy.powsimp,
    "tan": lambda e: e.rewrite(sympy.tan),
    "exp": lambda e: e.rewrite(sympy.exp),
    "expand_log": lambda e: sympy.expand_log(e, force=True),
    "reorder": lambda e: e,
}


def expression(rng: random.Random, depth: int) -> sympy.Expr:
    if depth == 0:
        numbers = [
            sympy.Rational(rng.randint(1, 9), rng.randint(1, 9)),
            sympy.pi,
            sympy.sqrt(rng.randint(2, 7)),
        ]
        return rng.choice([x, y, a, *numbers])
    left, right = expression(rng, depth - 1), expression(rng, depth - 1)
    match rng.randrange(8):
        case 0 | 1:
            return left + right
        case 2 | 3:
            return left * right
        case 4:
            return left - right
        case 5:
            return left ** rng.choice([2, 3, -1])
        case 6:
            return rng.choice([sympy.sin, sympy.cos, sympy.exp])(left)
    return sympy.log(left**2 + 1) / right


def test_identities_of_sympy():
    """Guards against equal forms missed and near forms accepted: 2,000 random identities, 2,000 broken ones."""
    rng, checked, missed, accepted = random.Random(0), 0, [], []
    while checked < 2000:
        e = expression(rng, rng.randint(1, 3))
        same = FORMS[rng.choice(list(FORMS))](e)
        near = rng.choice(
            [
                e + 1,
                2 * e,
                -e,
                e + x,
                e + sympy.Rational(1, 10**9),
                e * (1 + sympy.Rational(1, 10**6)),
            ]
        )
        gold, form, wrong = (
            sympy.latex(part, order=rng.choice(["lex", "rev-lex"])) for part in (e, same, near)
        )
        if (
            e == 0
            or any(f in gold + form + wrong for f in ("NaN", "tilde"))
            or len(gold + form) > 600
        ):
            continue
        checked += 1
        if not equal(gold, form):
            missed.append((gold, form))
        if equal(gold, wrong):
            accepted.append((gold, wrong))
    assert accepted == []
    assert len(missed) <= 20, missed[:3]


# ------------------------------------------------------------------------------------------------ fuzz

TEX = r"""\frac
\sqrt \left( \right) { } ( ) [ ] \{ \} ^ _ ! % ° ' , ; : | + - * / = < > \le \ne \approx \in \cup \setminus
\pm \mp \infty \pi e i x y n 0 1 2 9 . 99999 10^ ^{9} 9^9^9 !! \sin \log \ln \sum_{k=1}^{n} \binom \begin{pmatrix}
\end{pmatrix} & \\ \text{and} \text{cm} and or \$ $ \boxed{ \overline{ f( \circ ∞ √ ² ½ ٣ e999 1/0 0^0 {,} \! \, ** //
\lfloor \rfloor \mathbb{R} \mid \gamma 1,234 0.1\overline{6} 52_8 \mathrm{E} \text{th} \pmod{7}"""
PIECES = [*TEX.split(), "\x00", "\ud800", " "]


def mutate(rng: random.Random, text: str, other: str) -> str:
    for _ in range(rng.randint(1, 6)):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        piece = rng.choice(
            [
                rng.choice(PIECES),
                other[i:j],
                text[i:j] * rng.randint(0, 3),
                chr(rng.randrange(1, 0x3000)),
            ]
        )
        text = text[:i] + piece + text[rng.choice([i, j]) :]
    return text


def fuzz(seed: int, count: int, answers: list[tuple[str, str]]) -> None:
    """`judge`, because `verify` would hide an exception of ours."""
    rng = random.Random(seed)
    for _ in range(count):
        (answer, gold), (other, _) = rng.choice(answers), rng.choice(answers)
        answer = (
            mutate(rng, answer, other)
            if rng.random() < 0.8
            else "".join(rng.choices(PIECES, k=rng.randint(1, 40)))
        )
        gold = mutate(rng, gold, other) if rng.random() < 0.3 else gold
        start = time.thread_time()
        with contextlib.suppress(ParseError):
            verify.judge(answer, gold, start + 10, 0)
        assert time.thread_time() - start < 2, (answer, gold)


def test_fuzz_mutations(cases):
    """Guards against an exception or a long computation on anything a sampler at high temperature may write."""
    boxes = [(last_boxed(case["prediction"]), case["gold"]) for case in cases]
    fuzz(1, int(os.environ.get("NANOT1_FUZZ", 4000)), [(box, gold) for box, gold in boxes if box])


@settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)),
    st.text(max_size=20),
    st.booleans(),
)
def test_fuzz_text(answer, gold, boxed):
    """Guards against `verify` raising, for any two strings at all, in or out of a box."""
    assert verify.verify(
        f"\\boxed{{{answer}}}" if boxed else answer, gold, lenient=True
    ).outcome in (
        "correct",
        "wrong",
        "no_answer",
        "unparsed",
    )


HEAVY = {
    "gamma": "+".join(f"(x/{k})!!" for k in range(3, 150)),
    "rationals": "*".join(f"(1/{k}+1/{k + 1})^{{900}}" for k in range(11, 80)),
    "list": ",".join(rf"\sqrt{{{k}}}+x" for k in range(2, 48)),
    "inequalities": " or ".join(f"x<{k}" for k in range(150)),
    "powers": "+".join(f"{k}^{{4000}}" for k in range(2, 150)),
    "digits": r"\sin(x)" + "+1." + "3" * 390 + "+1." + "7" * 390 + "+x!" * 100,
    "nesting": "f(" * 24 + "x" + ")" * 24,
    "signs": "-" * 1500 + "1",
    "marks": "5" + "!" * 1501,
    "bars": "|" * 1999,
    "blanks": "1" + " " * 1900 + "x/",
    "backslashes": "\\" * 1999,
    "long": r"\boxed{" * 100_000,
    "huge": "{" * 2_000_000,
    "dots": "." * 90_000 + "x",
    "choice": "A)" + "." * 90_000 + "x",
    "spaces": " " * 90_000 + "x",
    "roots": "√" * 900 + "2",
    "fractions": r"\frac" * 350 + "1",
    "glued": "beta" * 60 + "qqq",
    "sets": r"\{" * 24 + "1" + r"\}" * 24,
    "matrix": r"\begin{pmatrix}1&1&1&1\\1&1&1&1\\1&1&1&1\\1&1&1&1\end{pmatrix}^{12}",
    "matrices": r"(\begin{pmatrix}1&x\\1&1\end{pmatrix}^{12})^{12}",
    "zeta": r"\zeta(0.5)+2^{-15000}",
    "gamma of 0.3": r"(0.3)!+2^{-15000}",
    "squares": "(" * 22 + "x" + ")^2" * 22 + "=0",
    "nested bars": "|" * 20 + "x" + "|" * 20,
    "bases": "1A" * 990,
    "mixed": "1\\frac{" * 11 + "x" + "}{2}" * 11,
    "applied": "f" + "(1)" * 600,
    "crossed": r"\times".join([r"\vec a"] * 250),
    "feet": "1 ft " * 390,
    "maxima": r"\max(" + ",".join(["x"] * 900) + ")",
    "many names": r"\max(" + ",".join("abcdefghjklmnopqrstuvwxyz" * 8) + ")",
    "many bars": "+".join(f"|{name}-2|" for name in "abcdefghjklmnopqrstuvwxyz" * 7),
    "signs and terms": r"\pm1" * 4 + "+x" * 980,
    "moduli": " mod ".join("1" * 330),
}


@pytest.mark.parametrize("name", HEAVY)
def test_no_answer_is_heavy(name):
    """Guards against inputs built to be slow: 2 s at most, for any, whatever the reference."""
    for gold in (HEAVY[name][:1500] + "+1", "42", r"\text{even}"):
        start = time.thread_time()
        got = verify.verify(f"\\boxed{{{HEAVY[name]}}}", gold, lenient=True)
        assert "RecursionError" not in got.answer_read
        assert time.thread_time() - start < 2
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**22
    )  # KB; the 300 MB are measured in test_attacks


# ------------------------------------------------------------------------------------------------ threads, processes

QUADRATICS = [(rf"\boxed{{x^2+{k}x+{2 * k}}}", f"{2 * k}+{k}x+x^2") for k in range(2, 26)]


def test_threads_agree_under_load():
    """Guards against SIGALRM (not for threads) and shared precision: 24 equal pairs, 8 threads, a busy CPU."""
    mixed = QUADRATICS + [
        (r"\boxed{\sin^2 x}", r"1-\cos^2 x"),
        (r"\boxed{\sqrt{2}}", "1.41421356"),
        (r"\boxed{3}", "4"),
    ]
    alone = [verify.verify(*pair) for pair in mixed]
    assert [verdict.correct for verdict in alone] == [True] * 25 + [False] * 2
    stop = threading.Event()
    burner = threading.Thread(target=lambda: [0 for _ in iter(stop.is_set, True)])
    burner.start()
    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(lambda pair: verify.verify(*pair), mixed)) == alone
    stop.set()
    burner.join()


def test_verify_many_keeps_order_and_its_workers():
    """Guards against shuffled verdicts, and against a new process for every call of a training run."""
    many = [(rf"\boxed{{{k}}}", str(k - k % 2)) for k in range(40)] + [
        ("none", "1"),
        (r"\boxed{^}", "1"),
    ]
    first = verify_many(many, workers=2)
    assert [verdict.outcome for verdict in first] == ["correct", "wrong"] * 20 + [
        "no_answer",
        "unparsed",
    ]
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(lambda _: verify_many(many, workers=2), range(4))) == [first] * 4
    pids = []
    for _ in range(2):
        verify_many(many, workers=1)
        pool = verify.shared_pool(1, os.getpid())
        pids.append(pool.threads.submit(lambda p=pool: p.local.worker.pid).result())
    assert pids[0] == pids[1]
    assert verify_many([]) == []


def test_a_hung_worker_is_killed_and_counted_as_a_timeout():
    """Guards against a run that waits for ever, and against a hang that is counted as a wrong answer."""
    pool = verify.Pool(1)
    hang = [sys.executable, "-c", "import time; time.sleep(600)"]

    def replace():
        pool.local.worker = subprocess.Popen(
            hang, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    pool.threads.submit(replace).result()
    start = time.monotonic()
    assert pool.threads.submit(pool.check, (r"\boxed{1}", "1"), 0.1).result().outcome == "timeout"
    assert time.monotonic() - start < 30
    assert (
        pool.threads.submit(pool.check, (r"\boxed{1}", "1"), 2.0).result().correct
    )  # a new worker


CHECKS = r"""
import signal
import verify
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
pairs = [(r"\boxed{\int_0^1 e^{-x^%d} dx}" % n, "1") for n in range(9)]
verify.verify_many(pairs[:2], workers=2)
print("ready", flush=True)
while True:
    verify.verify_many(pairs, workers=2)
"""


def workers_of(process: int) -> list[int]:
    """The processes that it has started, and that are alive."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = file.read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == process and state != "Z":
                found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize("ending", ["Ctrl-C", "to each", "killed"])
def test_workers_end_in_silence_with_their_parent(ending):
    """Bug: Ctrl-C prints a traceback for every worker; or a killed run leaves workers behind."""
    command = [sys.executable, "-c", CHECKS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        workers = workers_of(process.pid)
        assert len(workers) == 2
        if ending == "to each":
            for worker in workers:
                os.kill(worker, signal.SIGINT)
            time.sleep(0.5)
            assert workers_of(process.pid) == workers  # and they go on
        os.killpg(process.pid, signal.SIGKILL if ending == "killed" else signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()  # of a test that fails nothing goes on computing beside the others
    # The parent, which is no command of ours here, has a traceback; each worker would have its own.
    assert said.count("Traceback (most recent call last)") <= 1 and "serve" not in said
    began = time.monotonic()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def test_time_limit_is_a_timeout_not_a_wrong_answer():
    """Guards against undecided answers being rewarded or punished as if they had been judged."""
    assert verify.verify(r"\boxed{\sin x}", r"\cos x", timeout=0.0).outcome == "timeout"


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    """Guards against a broken installation that trains for hours on answers that all count as timeouts."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        pool = verify.Pool(1)
        pool.threads.submit(pool.check, (r"\boxed{1}", "1"), 2.0).result()


def test_tolerance_does_not_reach_infinity():
    """Guards against infinity being within any relative tolerance of itself."""
    for gold, answer in (
        (r"\infty", "3"),
        (r"\infty", r"-\infty"),
        ("3", r"\infty"),
        (r"\pi", r"\infty"),
    ):
        assert not verify.verify(f"\\boxed{{{answer}}}", gold, tolerance=1e-3).correct


def test_workers_do_not_import_torch():
    """Guards against seconds and hundreds of megabytes per worker process."""
    code = "import sys, verify; print('torch' in sys.modules, 'sympy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == [
        "False",
        "False",
    ]


# ------------------------------------------------------------------------------------------------ countdown


@pytest.mark.parametrize(
    "text, operators, value, numbers",
    [
        ("(3+4)*5", "+-*", 35, [3, 4, 5]),
        ("3 - 4 - 5", "+-*", -6, [3, 4, 5]),
        (r"3 \times 4 \cdot 5", "+-*", 60, [3, 4, 5]),
        ("7/2", "+-*/", Fraction(7, 2), [7, 2]),
        (r"2-\frac{3}{4}", "+-*/", Fraction(5, 4), [2, 3, 4]),
        (r"5/\frac{3+1}{4}", "+-*/", 5, [5, 3, 1, 4]),
        (r"6 \div 3", "+-*/", 2, [6, 3]),
        (r"\left(1+2\right)*3", "+*", 9, [1, 2, 3]),
        ("7", "+", 7, [7]),
    ],
)
def test_exact_arithmetic(text, operators, value, numbers):
    """Guards against floats, precedence slips and lost numbers in the countdown checker."""
    assert exact_arithmetic(text, operators) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "2**3",
            "2^3",
            "7//2",
            "--3",
            "-3",
            "+3",
            "3+-4",
            "3-(-4)",
            "(-3)",
            "2(3)",
            "(2)(3)",
            "2 3",
            "3 4/2",
            "1.5",
            "1e3",
        ),
        *(
            "٣+1",
            "³",
            "x",
            "3!",
            "5%",
            "",
            "()",
            "3+",
            "*3",
            "(3",
            "3)",
            "7/2",
            r"\frac{7}{2}",
            "{3}",
            "{3}{4}",
            "1,234",
        ),
        *(
            "9" * 13,
            "9" * 5000,
            "(" * 60 + "1" + ")" * 60,
            "1+" * 3000 + "1",
            "3=3",
            "1;2",
            "__import__('os')",
            "52_8",
            "1 1/2",
        ),
        *("|3|", r"\sqrt{9}", r"\text{3}+\$4", "3≤4", "3\x00", "[3]", r"\{3\}"),
    ],
)
def test_exact_arithmetic_refuses(text):
    """Guards against the neighbours' holes: 2**3, 7//2, glued or signed numbers, other scripts, and endless input."""
    with pytest.raises(ParseError):
        exact_arithmetic(text, "+-*")


def test_exact_arithmetic_refuses_division_by_zero_and_strange_fractions():
    """Guards against an exception that is not a ParseError, and a LaTeX group that smuggles in a product."""
    for text in (
        "1/0",
        r"\frac{1}{2-2}",
        r"\frac{1}{2}{3}",
        r"\frac{1}",
        r"\frac12",
        r"{1}\frac{2}{3}",
    ):
        if text == r"\frac12":
            assert exact_arithmetic(text, "+-*/") == (Fraction(1, 2), [1, 2])
        else:
            with pytest.raises(ParseError):
                exact_arithmetic(text, "+-*/")


# ------------------------------------------------------------------------------------------------ command line


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "verify.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_command_line(tmp_path):
    """Guards against the tool for surprising rewards not saying what it read, and a traceback for a bad file."""
    shown = command(r"\boxed{\frac{1}{2}}", "0.5").stdout
    assert "correct" in shown and r"\frac{1}{2}" in shown and "0.5" in shown
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"response": r"\boxed{1}", "gold": "1"},
        {"response": "?", "gold": "1"},
        {"response": r"\boxed{2}", "gold": 1},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    explained, table = command("--file", str(file)).stdout.split("---\n")
    assert [line.split()[:2] for line in table.strip().split("\n")] == [
        ["correct", "1"],
        ["no_answer", "1"],
        ["wrong", "1"],
    ]
    assert [line for line in explained.split("\n") if "decided" in line] == [
        "decided by literal",
        "decided by ",
        "decided by values",
    ]
    file.write_text("{")
    bad = command("--file", str(file))
    assert bad.returncode == 2 and "line 1" in bad.stderr and "Traceback" not in bad.stderr
    for wrong in (
        {"answer": r"\boxed{1}", "gold": "1"},
        {"response": r"\boxed{1}"},
        {"response": None, "gold": "1"},
    ):
        file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(wrong))
        bad = command("--file", str(file))
        assert bad.returncode == 2 and str(file) in bad.stderr and "line 2" in bad.stderr
    for arguments in ((), (r"\boxed{1}",), (r"\boxed{1}", "1", "--file", str(file))):
        bad = command(*arguments)
        assert bad.returncode == 2 and "Traceback" not in bad.stderr and "--file" in bad.stderr
